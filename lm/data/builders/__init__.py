"""The named texts as TensorFlow Datasets, for readers that want array_record files: ``python -m lm.data.builders``."""

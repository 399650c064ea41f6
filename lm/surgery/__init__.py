"""SOCKET surgery: other parameters made of given ones, for use at once or for training (`lm.surgery.base.Surgery`)."""

from __future__ import annotations

from lm.plug import Table

TABLE = Table(
    {
        "none": "lm.surgery.full_training:FullTraining",
        "lora": "lm.surgery.lora:LoRA",
        "int8": "lm.surgery.int8:Int8",
    }
)

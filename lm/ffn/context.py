"""What a feed-forward layer may look at beside the hidden states, when its plug says that it looks."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Call:
    """One call of a layer.

    `index_BT`: int32 place in the document, negative = padding; `ids_BT`: token ids (None when the model was given
    embeddings); `key`: the layer's random key, given in training and only there; `taps`: also hand out what is known
    per token.
    """

    index_BT: jax.Array
    ids_BT: jax.Array | None = None
    key: jax.Array | None = None
    taps: bool = field(default=False, metadata={"static": True})

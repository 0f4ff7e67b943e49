"""The columns in which the shells meet. Imports nothing, so that every shell may read it.

Raw rows (what ``data/sources.py`` yields): all of ``RAW_ROW``.
Encoded rows (``encoded/{train,validation}/*.parquet``): all of ``ENCODED``. Tensors are stored as raw little-endian bytes,
because not every Parquet reader knows half floats; their shapes and types stand in ``encoded/encoding.json``.
Assigned rows (``assigned/expert=<k>/*.parquet``): the encoded columns and ``EXPERT``.
"""

KEY = "key"  # str: unique in its unit
SHARD = "shard"  # str: name of the unit (a shard, or a range of rows of a table) that the row came from
POSITION = "position"  # int64: where in its unit the row stands: byte offset of a tar sample's first header, else a row number
VIEW = "view"  # int32: which augmented view of the image, 0 for the first
IMAGE = "image"  # uint8 [height, width, 3]
CAPTION = "caption"  # str
ALTERNATES = "alternates"  # list[str]: other captions of the same image; may be empty
GROUP = "group"  # str: a label of the kind of prompt, "" where the source has none; only reports read it
METADATA = "metadata"  # str: the source's own JSON, "" where there is none

LATENT_MEAN = "latent_mean"  # float16 [channels, height, width]: mean of the VAE's posterior, times its scaling factor
LATENT_STD = "latent_std"  # float16, the same shape: its standard deviation, times the scaling factor
TEXT_STATES = "text_states"  # float16 [tokens, width]: what the model reads of the caption; see core/text.py
TEXT_TOKENS = "text_tokens"  # int32 [ids]: token ids of all tokenizers, in place of the states where encode.text is "tokens"
TEXT_LENGTH = "text_length"  # int: how many of the tokens are real, the rest is padding
EMBEDDING = "embedding"  # float32 [dim]: z, the prompt encoder's mean-pooled embedding

EXPERT = "expert"  # int: the code that the prompt is routed to
REASON = "reason"  # str: why a row was rejected, "" for a usable one

# Only between the tasks of the encode stream.
UNIT = "unit"  # int32: index of the row's unit
ORDINAL = "ordinal"  # int32: number of the row in its unit, rejected rows and views counted
LAST = "last"  # bool: whether it is the unit's last

RAW = (KEY, SHARD, IMAGE, CAPTION, ALTERNATES, GROUP, METADATA)
RAW_ROW = (*RAW, POSITION, REASON)
ENCODED = (
    KEY, SHARD, POSITION, VIEW, CAPTION, ALTERNATES, GROUP, METADATA,
    LATENT_MEAN, LATENT_STD, TEXT_STATES, TEXT_LENGTH, EMBEDDING,
)  # fmt: skip
TENSORS = (LATENT_MEAN, LATENT_STD, TEXT_STATES)  # of an encoded row; as encoding.pack makes them
REJECTED = (KEY, SHARD, REASON)

# First words of the reason of a unit's only row where the unit could not be reached: such a unit is tried again.
UNREACHABLE = "shard is unreachable"

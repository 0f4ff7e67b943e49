"""The columns in which the shells meet. Imports nothing, so that every shell may read it.

Raw rows (what ``data/sources.py`` yields): ``KEY, SHARD, IMAGE, CAPTION, ALTERNATES, GROUP, METADATA``.
Encoded rows (``encoded/{train,validation}/*.parquet``): all of ``ENCODED``. Tensors are stored as raw little-endian bytes,
because not every Parquet reader knows half floats; their shapes and types stand in ``encoded/encoding.json``.
Assigned rows (``assigned/expert=<k>/*.parquet``): the encoded columns and ``EXPERT``.
"""

KEY = "key"  # str: unique in a source
SHARD = "shard"  # str: the shard or file that the row came from
IMAGE = "image"  # uint8 [height, width, 3]
CAPTION = "caption"  # str
ALTERNATES = "alternates"  # list[str]: other captions of the same image; may be empty
GROUP = "group"  # str: a label of the kind of prompt, "" where the source has none; only reports read it
METADATA = "metadata"  # str: the source's own JSON, "" where there is none

LATENT_MEAN = "latent_mean"  # float16 [channels, height, width]: mean of the VAE's posterior, times its scaling factor
LATENT_STD = "latent_std"  # float16, the same shape: its standard deviation, times the scaling factor
TEXT_STATES = "text_states"  # float16 [tokens, width]: the text encoder's last hidden state
TEXT_LENGTH = "text_length"  # int: how many of the tokens are real, the rest is padding
EMBEDDING = "embedding"  # float32 [dim]: z, the prompt encoder's mean-pooled embedding

EXPERT = "expert"  # int: the code that the prompt is routed to
REASON = "reason"  # str: why a row was rejected

RAW = (KEY, SHARD, IMAGE, CAPTION, ALTERNATES, GROUP, METADATA)
ENCODED = (KEY, SHARD, CAPTION, ALTERNATES, GROUP, METADATA, LATENT_MEAN, LATENT_STD, TEXT_STATES, TEXT_LENGTH, EMBEDDING)
TENSORS = (LATENT_MEAN, LATENT_STD, TEXT_STATES)  # of an encoded row; as encoding.pack makes them
REJECTED = (KEY, SHARD, REASON)

"""What every section of the configuration tree is made of, and the errors that users can mend."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Precision = Literal["fp32", "bf16", "fp16"]

MOST_IMAGES = 32  # of one UNet call, where the config sets no limit

# In the annotation of a field that says where or how fast a thing is made, never what: it is in no stage's hash.
HOW = "how"

# In the annotation of a field that is younger than runs worth keeping: at its default, which is what they were made with, it is
# in no stage's hash.
YOUNG = "young"


class UserError(Exception):
    """Something that the user can mend; the message is one line and says what to change."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used."""


class Section(BaseModel):
    """Base of every section: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

"""Adapters of Hugging Face PEFT, both ways."""

from .folder import FORMATS as FORMATS, load_peft as load_peft, save_peft as save_peft
from .verbs import (
    export_adapter as export_adapter,
    from_loralib as from_loralib,
    import_adapter as import_adapter,
    inspect as inspect,
)

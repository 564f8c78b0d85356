"""Adapters of Hugging Face PEFT, both ways."""

from .folder import FORMATS as FORMATS, load_peft as load_peft, save_peft as save_peft

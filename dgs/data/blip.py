"""BLIP through transformers: images in, one English sentence each out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dgs.data.captions import BLIP
from dgs.device import choose_device
from dgs.errors import UserError

MAX_TOKENS = 30  # of a caption; BLIP's are about ten
TOWERS = ("vision_model.encoder.", "text_decoder.bert.encoder.")  # weights that every captioning BLIP brings


class Blip:
    """A captioning model on its device, decoding greedily: the same batch gets the same captions."""

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self.model, self.processor, self.device = model.to(device).eval(), processor, device

    def view(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """What the model sees of an image: (H, W, 3) uint8 to (3, S, S) float32, on the CPU."""
        # From an array the processor would have to guess the channels, and guesses wrong where a side is 1 or 3 px.
        image = Image.fromarray(pixels)
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def captions(self, views: Sequence[torch.Tensor]) -> list[str]:
        """(3, S, S) float32 views to a caption each, white space normalized; "" where the model found no word.

        Raises:
            UserError: the batch does not fit the device's memory.
        """
        try:
            tokens = self.model.generate(
                pixel_values=torch.stack(list(views)).to(self.device),
                max_new_tokens=MAX_TOKENS,
                num_beams=1,
                do_sample=False,
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"A batch of {len(views)} images does not fit the memory of {self.device}. Give a smaller "
                f"--batch-size; what was captioned so far is kept."
            ) from None
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200].rstrip(".")


def _read(name: str, local: bool) -> tuple[Any, Any]:
    """(model, processor) from a folder or the cache (local), or by download."""
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    logging = transformers.utils.logging
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # it announces every retry
    (logging.disable_progress_bar if local else logging.enable_progress_bar)()  # downloads are worth a bar
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=local)
    if config.model_type != "blip":
        raise UserError(
            f"Expected a BLIP captioning model in '{name}', found a model of type {config.model_type}. Give another "
            f"--model, for example {BLIP}."
        )
    processor = transformers.BlipProcessor.from_pretrained(name, local_files_only=local)
    model, loading = transformers.BlipForConditionalGeneration.from_pretrained(
        name, local_files_only=local, output_loading_info=True
    )
    # transformers fills what is missing with random numbers, and a BLIP for retrieval has no decoder.
    if missing := sorted(key for key in loading["missing_keys"] if key.startswith(TOWERS)):
        raise UserError(
            f"Expected the weights of a BLIP captioning model in '{name}', found none for {missing[0]} and "
            f"{len(missing) - 1} others. Give another --model, for example {BLIP}."
        )
    return model, processor


def load_blip(name: str = BLIP, device: str = "auto", warn: Callable[[str], None] = lambda _: None) -> Blip:
    """A BLIP by its name on the Hugging Face Hub (from the cache, else downloaded), or from a local folder.

    Args:
        device: as `choose_device` takes it.
        warn: told before a download begins.

    Raises:
        UserError: transformers is not installed, the weights are not to be had or no captioning BLIP's, or there is
            no such device.
    """
    chosen = choose_device(device, "--device")
    try:
        import transformers  # noqa: F401
        from huggingface_hub.constants import HF_HUB_OFFLINE
    except ImportError as error:
        raise UserError(
            f"Captioning needs transformers, which cannot be imported ({error}). Install it from the root of the "
            f"repository: pip install -e '.[captions]'. Or give your own caption file: --captions FILE."
        ) from None
    folder = Path(name).is_dir()
    try:
        try:
            model, processor = _read(name, local=True)
        except OSError:  # what transformers raises for "not in the cache"
            if folder or HF_HUB_OFFLINE:
                raise
            warn(f"{name} is not on this machine: downloading it.")
            model, processor = _read(name, local=False)
    except UserError:
        raise
    except Exception as error:  # damaged weights, configs and networks fail in many ways
        if folder:
            raise UserError(
                f"Expected a BLIP captioning model in the folder {name}, found none that loads ({_reason(error)}). "
                f"Restore it, or give another --model."
            ) from None
        raise UserError(
            f"Cannot load '{name}': it is no folder, not in the cache and cannot be downloaded ({_reason(error)}). "
            f"With a network, run: hf download {name}. Without one, run hf download {name} --local-dir FOLDER "
            f"elsewhere, copy the folder here and give --model FOLDER; or give your own caption file: --captions FILE."
        ) from None
    return Blip(model, processor, chosen)

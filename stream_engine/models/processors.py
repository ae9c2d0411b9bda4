"""A checkpoint's own processor, with Pillow's image processing and without torchvision.

torchvision's resizing differs from what models were trained with, and transformers' loaders ask for
it in places where pictures do not need it (videos, automatic class lookup, Pixtral). So the parts
are loaded one by one and put together here. Remote code is never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import ProcessorMixin
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from stream_engine.errors import CheckpointError
from stream_engine.models.intact import read_json
from stream_engine.models.native import LOAD_ERRORS, load_tokenizer, one_line


def load_processor(checkpoint: Path, model_type: str) -> ProcessorMixin:
    """The processor for pictures and text; the parts for videos and sound are left out.

    Raises:
        CheckpointError: when a file is missing, or a class needs a library that is not installed.
    """
    name = _processor_name(checkpoint, model_type)
    try:
        own_class = _class_named(name)

        class PictureProcessor(own_class):  # type: ignore[misc, valid-type]
            """The checkpoint's own class, which may go without a video processor."""

            def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
                if argument is None:
                    return None
                return super().check_argument_for_proper_class(argument_name, argument)

        PictureProcessor.__name__ = own_class.__name__
        loaders = {
            "tokenizer": lambda: load_tokenizer(checkpoint),
            "image_processor": lambda: load_image_processor(checkpoint, model_type),
        }
        parts = [loaders.get(part, lambda: None)() for part in own_class.get_attributes()]
        stated, _ = own_class.get_processor_dict(checkpoint, local_files_only=True)
        return PictureProcessor.from_args_and_dict(parts, stated)
    except LOAD_ERRORS as error:
        raise CheckpointError(f"cannot load {name} of {checkpoint}: {one_line(error)}") from error


def load_image_processor(checkpoint: Path, model_type: str) -> Any:
    """The image processor's Pillow form; its torchvision form where there is no other."""
    stated = read_json(checkpoint / "preprocessor_config.json")
    stated = stated or read_json(checkpoint / "processor_config.json").get("image_processor", {})
    name = stated.get("image_processor_type") or ""
    if not name:
        mapped: Any = dict(IMAGE_PROCESSOR_MAPPING_NAMES).get(model_type) or {}
        name = mapped.get("pil") or mapped.get("torchvision") or ""
    name = name.removesuffix("Fast").removesuffix("Pil")
    image_class = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name, None)
    if image_class is None:
        raise CheckpointError(f"{checkpoint}: transformers has no image processor {name!r}")
    return image_class.from_pretrained(checkpoint, local_files_only=True)


class PixtralPictures(ProcessorMixin):
    """Pixtral's and Mistral 3's processor, which transformers offers with torchvision only.

    An image stands as rows of `image_token`, each closed by `image_break_token`, the last one by
    `image_end_token`.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.cell = patch_size * spatial_merge_size
        self.image_token = image_token
        self.image_break_token = image_break_token
        self.image_end_token = image_end_token
        self.image_token_id, *others = tokenizer.convert_tokens_to_ids(
            [image_token, image_break_token, image_end_token]
        )
        self.image_token_ids = [self.image_token_id, *others]

    def _process_images(self, images: Any, **options: Any) -> Any:
        return super()._process_images(images, **{**options, "patch_size": self.cell})

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The text of one image (called by ProcessorMixin)."""
        height, width = (int(n) // self.cell for n in image_inputs["image_sizes"][image_idx])
        row = self.image_token * width
        return self.image_break_token.join([row] * height) + self.image_end_token

    @property
    def model_input_names(self) -> list[str]:
        names = self.tokenizer.model_input_names + self.image_processor.model_input_names
        return [*names, "image_sizes"]


def _processor_name(checkpoint: Path, model_type: str) -> str:
    """From the checkpoint's own files, then by model type; CheckpointError when neither knows."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if name := read_json(checkpoint / file).get("processor_class"):
            return name
    if name := dict(PROCESSOR_MAPPING_NAMES).get(model_type):
        return name
    raise CheckpointError(f"{checkpoint} names no processor; add its processor_config.json")


def _class_named(name: str) -> Any:
    if name == "PixtralProcessor" and not is_torchvision_available():
        return PixtralPictures
    if name == "SmolVLMProcessor":
        name = "Idefics3Processor"  # the same for pictures, and asks for no video processor
    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(f"transformers has no class {name}")
    return found

"""The trainable form of the demo's vision-language models, and their layout on disk.

A CLIP tower, a two-layer projector and a Llama, all plain transformers modules, put together and
stored as LLaVA-1.5 is. The engine has its own loader: this is for training alone, which
`stream_engine.demo.loop` does, and what made the checkpoints.

Shapes: B images, N rows of text (N / B for each image), P tokens before the image, I image
tokens, S tokens after it, D hidden size.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Cache,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

from stream_engine.demo.world import IMAGE_SIZE

SYSTEM_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
PATCH_SIZE = 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
MAX_POSITIONS = 2048
IGNORE = -100
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
BEFORE_IMAGE = f"{SYSTEM_PROMPT} USER: "
AFTER_IMAGE = "\n{} ASSISTANT:"

_TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
_PROJECTOR_PREFIX = "model.mm_projector."


def vision_config() -> dict:
    return {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,  # LLaVA reads the last but one
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 64,
    }


def language_config(vocab_size: int) -> dict:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


class TinyLlava(nn.Module):
    """LLaVA-1.5 in small: the image stands between the system prompt and the question."""

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.lm = LlamaForCausalLM(LlamaConfig(**language_config(len(tokenizer))))
        self.tower = CLIPVisionModel(CLIPVisionConfig(**vision_config()))
        width = self.lm.config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(self.tower.config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        self.before_ids = torch.tensor([tokenizer(BEFORE_IMAGE).input_ids])  # [1, P]

    def tower_features(self, pixels: Tensor) -> Tensor:
        """[B, 3, 48, 48] -> [B, I, 64]: the patches of the tower's last but one layer."""
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        return states[-2][:, 1:]

    def freeze_vision(self) -> None:
        """Train the language model alone from here on, as LLaVA leaves its tower alone."""
        self.tower.requires_grad_(False)
        self.projector.requires_grad_(False)

    def prefill(self, pixels: Tensor, suffix_ids: Tensor) -> tuple[Tensor, Cache]:
        """Hidden states [N, S, D] of the tokens after the image, and the key/value cache.

        With B images, rows i*N/B to (i+1)*N/B of the suffixes belong to image i. The system prompt
        is the same for all, so it runs once, and each image once; gradients flow through the cache.
        """
        cache = self.lm.model(self.before_ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(pixels))
        features = self.projector(self.tower_features(pixels))
        self.lm.model(inputs_embeds=features, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(suffix_ids) // len(pixels))
        out = self.lm.model(suffix_ids, past_key_values=cache, use_cache=True)
        return out.last_hidden_state, cache

    def forward(self, pixels: Tensor, suffix_ids: Tensor, labels: Tensor) -> Tensor:
        """Log-probs [N, S-1] of the labelled tokens given those before; 0 where not labelled."""
        hidden, _ = self.prefill(pixels, suffix_ids)
        targets = labels[:, 1:]
        wanted = targets != IGNORE
        logits = self.lm.lm_head(hidden[:, :-1][wanted]).float()
        logps = torch.log_softmax(logits, -1).gather(-1, targets[wanted][:, None])[:, 0]
        return torch.zeros(targets.shape).masked_scatter(wanted, logps)

    def mean_loss(self, pixels: Tensor, texts: list[tuple[str, str]]) -> Tensor:
        """Mean negative log-prob of the answers' tokens."""
        suffix_ids, labels = self.batch(texts)
        return -self(pixels, suffix_ids, labels).sum() / (labels != IGNORE).sum()

    def suffix(self, prompt: str, answer: str | None = None) -> tuple[list[int], int]:
        """Token ids after the image, and how many of them are prompt.

        The original splits the text at the image and encodes each part by itself; the start token
        of the later part is dropped. An answer is followed by the end token.
        """
        text = AFTER_IMAGE.format(prompt)
        prompt_ids = self.tokenizer(text).input_ids[1:]
        if answer is None:
            return prompt_ids, len(prompt_ids)
        ids = self.tokenizer(f"{text} {answer}").input_ids[1:]
        assert ids[: len(prompt_ids)] == prompt_ids, (prompt, answer)
        return [*ids, self.tokenizer.eos_token_id], len(prompt_ids)

    def batch(self, texts: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Right-padded suffix ids and labels [N, S] of (prompt, answer) texts."""
        rows = [self.suffix(prompt, answer) for prompt, answer in texts]
        width = max(len(ids) for ids, _ in rows)
        suffix_ids = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORE)
        for row, (ids, num_prompt) in enumerate(rows):
            suffix_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
        return suffix_ids, labels

    @torch.no_grad()
    def sample(
        self,
        pixels: Tensor,
        prompt: str,
        *,
        count: int,
        temperature: float,
        generator: torch.Generator,
        max_new_tokens: int = 64,
    ) -> list[list[int]]:
        """Token ids (end token included) of `count` answers to one prompt; top-p and top-k off."""
        suffix_ids = torch.tensor([self.suffix(prompt)[0]])
        return self.sample_each(
            pixels[None],
            suffix_ids,
            count=count,
            temperature=temperature,
            generator=generator,
            max_new_tokens=max_new_tokens,
        )

    @torch.no_grad()
    def sample_each(
        self,
        pixels: Tensor,
        suffix_ids: Tensor,
        *,
        count: int,
        temperature: float,
        generator: torch.Generator,
        max_new_tokens: int = 64,
    ) -> list[list[int]]:
        """The same for prompts [B, S] of equal length, each about its image: B * count rows."""
        hidden, cache = self.prefill(pixels, suffix_ids)
        cache.batch_repeat_interleave(count)
        hidden = hidden[:, -1].repeat_interleave(count, 0)
        columns: list[Tensor] = []
        ended = torch.zeros(len(hidden), dtype=torch.bool)
        while len(columns) < max_new_tokens and not ended.all():
            logits = self.lm.lm_head(hidden).float()
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                probs = torch.softmax(logits / temperature, -1)
                token = torch.multinomial(probs, 1, generator=generator)[:, 0]
            columns.append(token)
            ended |= token == self.tokenizer.eos_token_id
            out = self.lm.model(token[:, None], past_key_values=cache, use_cache=True)
            hidden = out.last_hidden_state[:, -1]
        rows = torch.stack(columns, dim=1).tolist()
        end = self.tokenizer.eos_token_id
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    def word_id(self, word: str) -> int:
        """The token of a word that is one token."""
        (token,) = self.tokenizer(word, add_special_tokens=False).input_ids
        return token

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def to_pixels(images: list[Image.Image]) -> Tensor:
    """[B, 3, 48, 48] of images of the world's own size, as CLIP's processor makes them."""
    assert all(image.size == (IMAGE_SIZE, IMAGE_SIZE) for image in images)
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255
    array = (array - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def save_checkpoint(model: TinyLlava, tokenizer_folder: Path, folder: Path) -> None:
    """Write a LLaVA-1.5 checkpoint in float16, the tower inside, its configuration beside."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.lm.state_dict())
    for prefix, module in ((_TOWER_PREFIX, model.tower), (_PROJECTOR_PREFIX, model.projector)):
        for name, tensor in module.state_dict().items():
            tensors[prefix + name] = tensor
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    _write_language_configs(folder, len(model.tokenizer))
    _write_tower_configs(folder / "vision_tower")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(tokenizer_folder / name, folder / name)


def _write_language_configs(folder: Path, vocab_size: int) -> None:
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            **language_config(vocab_size),
            "max_length": MAX_POSITIONS,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "torch_dtype": "float16",
            "use_cache": True,
            "tokenizer_model_max_length": MAX_POSITIONS,
            "tokenizer_padding_side": "right",
            "image_aspect_ratio": "pad",
            "image_grid_pinpoints": None,
            "mm_hidden_size": vision_config()["hidden_size"],
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "vision_tower",
            "use_mm_proj": True,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": 0,
            "max_new_tokens": 64,
        },
    )


def _write_tower_configs(tower: Path) -> None:
    tower.mkdir(exist_ok=True)
    _write_json(
        tower / "config.json",
        {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            **vision_config(),
        },
    )
    _write_json(
        tower / "preprocessor_config.json",
        {
            "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(IMAGE_MEAN),
            "image_processor_type": "CLIPImageProcessor",
            "image_std": list(IMAGE_STD),
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": IMAGE_SIZE},
        },
    )


def load_checkpoint(folder: Path) -> TinyLlava:
    """The model of a folder that `save_checkpoint` wrote, in float32."""
    model = TinyLlava(LlamaTokenizer.from_pretrained(folder))
    tensors = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    for prefix, module in ((_TOWER_PREFIX, model.tower), (_PROJECTOR_PREFIX, model.projector)):
        names = [name for name in tensors if name.startswith(prefix)]
        module.load_state_dict({name[len(prefix) :]: tensors.pop(name) for name in names})
    model.lm.load_state_dict(tensors)
    return model


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

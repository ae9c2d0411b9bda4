"""Write what a checkpoint's ORIGINAL code computes, for `stream-engine verify-checkpoint`.

Run it in the checkpoint's own environment, which is not this package's:

    LLaVA-1.5, RLAIF-V-7B, OmniLMM   the RLAIF-V repository, transformers 4.37, torch of your GPU
        PYTHONPATH=/path/to/RLAIF-V python dump_reference.py llava CHECKPOINT dump.safetensors
    MiniCPM-V-2_6, MiniCPM-Llama3-V-2_5   transformers 4.40; their code comes with the checkpoint
        python dump_reference.py minicpm CHECKPOINT dump.safetensors --allow-remote-code
    any model that transformers knows   any environment that has it
        python dump_reference.py hf CHECKPOINT dump.safetensors

then, in this package's environment:

    stream-engine verify-checkpoint CHECKPOINT --reference dump.safetensors

The dump holds, for each case: `N/image` uint8 [H, W, 3]; `N/prompt_ids` with every run of image
positions written as one -200; `N/answer_ids` (the answer, then the end token); `N/answer_logps`
float32, their log-probs by one plain forward. It needs numpy, Pillow, safetensors and torch only.
"""

import argparse
import json

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

CASES = [
    ("What is in the picture?", "A red circle on a white ground."),
    ("Is there a dog? Answer yes or no.", "No, there is no dog."),
]


def picture(number):
    image = Image.new("RGB", (320, 200 + 80 * number), ["white", "grey"][number])
    ImageDraw.Draw(image).ellipse((40, 40, 160, 160), fill="red")
    return image


def collapse(ids, image_ids):
    out = []
    for token in ids:
        token = -200 if token in image_ids else token
        if token != -200 or out[-1:] != [-200]:
            out.append(token)
    return out


def answer_logps(logits, ids):
    """Log-probs of the last len(ids) tokens from logits [T, V] of the whole sequence."""
    logps = torch.log_softmax(logits[-len(ids) - 1 : -1].float(), dim=-1)
    return logps.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].cpu().numpy()


def llava(checkpoint, device, dtype, remote):
    """The LLaVA package's own loader, template `llava_v1` and padded image."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(checkpoint)
    tokenizer, model, processor, _ = load_pretrained_model(checkpoint, None, name, device=device)
    model = model.to(dtype).eval()

    def run(image, question, answer):
        conversation = conv_templates["llava_v1"].copy()
        conversation.append_message(conversation.roles[0], "<image>\n" + question)
        conversation.append_message(conversation.roles[1], None)
        prompt = tokenizer_image_token(
            conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt"
        )
        ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        pixels = process_images([image], processor, model.config).to(device, dtype)
        whole = torch.cat([prompt, torch.tensor(ids)])[None].to(device)
        logits = model(input_ids=whole, images=pixels).logits[0]
        return prompt.tolist(), ids, answer_logps(logits, ids)

    return run


def minicpm(checkpoint, device, dtype, remote):
    """The checkpoint's remote code: its processor and forward."""
    if not remote:
        raise SystemExit("this runs code out of the checkpoint; say so with --allow-remote-code")
    from transformers import AutoModel, AutoProcessor, AutoTokenizer

    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True, torch_dtype=dtype)
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)

    def run(image, question, answer):
        content = "(<image>./</image>)\n" + question
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor([text], [[image]], return_tensors="pt").to(device)
        prompt = inputs["input_ids"][0].tolist()
        ends = ["<|im_end|>", "<|eot_id|>"]
        end = next(tokenizer.convert_tokens_to_ids(e) for e in ends if e in tokenizer.get_vocab())
        ids = [*tokenizer(answer, add_special_tokens=False).input_ids, end]
        whole = torch.tensor([prompt + ids], device=device)
        inputs["input_ids"] = whole
        inputs["position_ids"] = torch.arange(whole.shape[1], device=device)[None]
        logits = model(dict(inputs)).logits[0]
        return collapse(prompt, {tokenizer.unk_token_id}), ids, answer_logps(logits, ids)

    return run


def hf(checkpoint, device, dtype, remote):
    """A class of transformers, with the checkpoint's own chat template."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, torch_dtype=dtype)
    model = model.to(device).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)

    def run(image, question, answer):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(images=[image], text=[text], return_tensors="pt").to(device)
        prompt = inputs["input_ids"][0].tolist()
        tokenizer = processor.tokenizer
        ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        extra = torch.tensor([ids], device=device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], extra], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = model(**inputs).logits[0]
        return collapse(prompt, {model.config.image_token_id}), ids, answer_logps(logits, ids)

    return run


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["llava", "minicpm", "hf"])
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--allow-remote-code", action="store_true")
    args = parser.parse_args()
    load = {"llava": llava, "minicpm": minicpm, "hf": hf}[args.kind]
    run = load(args.checkpoint, args.device, getattr(torch, args.dtype), args.allow_remote_code)
    tensors, cases = {}, []
    for number, (question, answer) in enumerate(CASES):
        image = picture(number)
        prompt_ids, ids, logps = run(image, question, answer)
        tensors[f"{number}/image"] = np.array(image)
        tensors[f"{number}/prompt_ids"] = np.array(prompt_ids, dtype=np.int64)
        tensors[f"{number}/answer_ids"] = np.array(ids, dtype=np.int64)
        tensors[f"{number}/answer_logps"] = logps.astype(np.float32)
        cases.append({"question": question, "answer": answer})
    about = {
        "kind": args.kind,
        "dtype": args.dtype,
        "torch": torch.__version__,
        "transformers": __import__("transformers").__version__,
        "cases": cases,
    }
    save_file(tensors, args.out, metadata={"stream_engine_reference": json.dumps(about)})
    print(f"wrote {len(cases)} cases to {args.out}")


if __name__ == "__main__":
    main()

"""A run of the example that takes a second or two, in a child of this process.

The process that imports torch forks a child for each run, so that a run costs seconds and not ten.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    SamConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from sam_medical.cli import train
from sam_medical.training.progress import Progress

STEPS = 12


def run_in_a_child(options: dict, folder: Path, kill_after: float | None) -> int:
    """Runs train.py in a forked process, and kills it after some seconds; its exit code, or minus its signal."""
    child = os.fork()
    if child == 0:
        _become_train({**options, "output_dir": folder}, folder.with_name(f"{folder.name}.log"))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become_train(options: dict, log: Path) -> None:
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        options = dict(options)
        _kill_at(options.pop("stop_after", None))
        sys.argv = ["train.py", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
        train.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill_at(step: int | None) -> None:
    """Lets this process kill itself after that step."""
    add_step = Progress.add_step

    def add_step_or_die(progress: Progress, loss: float) -> None:
        add_step(progress, loss)
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Progress.add_step = add_step_or_die


def result_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return load_file(folder / "adapter" / "adapter_model.safetensors"), {
        "history": metrics["history"],
        "test": metrics["test"],
    }


def same(one, other) -> bool:
    tensors, texts = zip(one, other, strict=True)
    equal = tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0]
    )
    return equal and texts[0] == texts[1]


def make_options(root: Path) -> dict:
    """A run of a second or two: disks on a noisy ground, and random models of the true classes."""
    torch.manual_seed(0)
    _write_images(root / "data")
    vision = SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, mlp_dim=64, window_size=3,
        global_attn_indexes=[1], initializer_range=0.02,
    )  # fmt: skip
    prompts = SamPromptEncoderConfig(image_size=64, patch_size=16)
    SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, initializer_range=0.02)).save_pretrained(
        root / "sam"
    )
    tokens = ["<|startoftext|>", "<|endoftext|>", *(letter + end for letter in "cyst" for end in ("", "</w>"))]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(root / "clip")
    CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            projection_dim=24, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    ).save_pretrained(root / "clip")  # fmt: skip
    return {
        "dataset": "own", "data_root": root / "data", "backbone": root / "sam", "text_encoder": root / "clip",
        "image_size": 32, "steps": STEPS, "validate_every": 3, "batch_size": 2, "warmup_steps": 1, "overlays": 1,
        "learning_rate": 0.01, "resume": True,
    }  # fmt: skip


def _write_images(root: Path) -> None:
    random_numbers = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for number in range(10):
        y, x = np.mgrid[:40, :48]
        disk = (y - random_numbers.integers(12, 28)) ** 2 + (x - random_numbers.integers(12, 36)) ** 2 < 80
        image = np.where(disk, 180, 60) + random_numbers.integers(-30, 30, disk.shape)
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{number}.png")
        Image.fromarray(disk.astype(np.uint8)).save(root / "masks" / f"{number}.png")
    (root / "labels.json").write_text('{"cyst": 1}')

"""Fixtures of the sam_medical tests: tiny models, miniature datasets, and runners of the commands."""

import csv
import locale
import re
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    SamConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="session")
def signals_that_are_not_ignored():
    """Restores default signal handlers. nohup and background jobs ignore some signals, and children inherit that."""
    for number, default in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, default)


@pytest.fixture(autouse=True)
def the_same_locale_for_every_test():
    """Restores the locale. A scan-reading library sets the C locale, in which Python opens text as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(scope="session")
def tiny_sam_config():
    """SAM's architecture with few narrow layers: 64-pixel images, 16-pixel patches, the last layer is global."""
    vision = SamVisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        mlp_dim=64,
        window_size=3,
        global_attn_indexes=[2],
        initializer_range=0.02,
    )
    prompts = SamPromptEncoderConfig(image_size=64, patch_size=16)
    return SamConfig(vision_config=vision, prompt_encoder_config=prompts, initializer_range=0.02)


@pytest.fixture(scope="session")
def tiny_sam_folder(tiny_sam_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    SamModel(tiny_sam_config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory):
    """A CLIP text encoder with random weights, and a tokenizer of single letters."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=24,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch):
    """Runs a command in this process."""

    def run(command, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr("sys.argv", [command.__name__, *flags])
        command.main()

    return run


@pytest.fixture
def refused(capsys):
    """Expects the block to exit with status 2 and one line on stderr that matches a pattern."""

    @contextmanager
    def refused(pattern):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            yield
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1 and re.search(pattern, lines[0]), (stop.value.code, lines)

    return refused


@pytest.fixture
def from_download_to_table(run, tiny_sam_folder, tiny_clip_folder, tmp_path):
    """Trains with a dataset's config, in miniature, and evaluates. Returns the table's rows by label."""
    from sam_medical.cli import evaluate, train

    def go(config, data_root):
        few = {"image_size": 32, "steps": 2, "validate_every": 2, "warmup_steps": 1, "batch_size": 2}
        cheap = {"gradient_accumulation_steps": 1, "num_workers": 0, "overlays": 1}
        models = {"backbone": tiny_sam_folder, "text_encoder": tiny_clip_folder}
        files = {"data_root": data_root, "output_dir": tmp_path / "run"}
        run(train, config=ROOT / f"examples/sam_medical/configs/{config}.yaml", **few, **cheap, **models, **files)
        run(evaluate, adapter=tmp_path / "run" / "adapter", data_root=data_root, csv=tmp_path / "table.csv")
        with (tmp_path / "table.csv").open(newline="") as file:
            return {row["label"]: row for row in csv.DictReader(file)}

    return go


@pytest.fixture
def glas_folder(tmp_path):
    """A miniature of the public layout: disks on noise, instance ids as mask values, two image sizes."""
    folder = tmp_path / "data" / "Warwick_QU_Dataset"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", 7), ("testA", 2), ("testB", 1)):
        for number in range(1, count + 1):
            height, width = (40, 56) if number % 2 else (48, 48)
            y, x = np.mgrid[:height, :width]
            centre_y, centre_x = random.integers(12, 28, 2)
            disk = (y - centre_y) ** 2 + (x - centre_x) ** 2 < 100
            image = np.where(disk[..., None], (170, 60, 150), (230, 200, 220)) + random.integers(
                -20, 20, (height, width, 3)
            )
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{prefix}_{number}.bmp")
            Image.fromarray((disk * 3).astype(np.uint8)).save(folder / f"{prefix}_{number}_anno.bmp")
    (folder / "Grade.csv").write_text("name, grade (GlaS)\ntestA_1, benign\n")
    return folder.parent

"""Bad configs and damaged adapter folders give a clear error or the right result.

The cases are generated: each field of the config with each value of a list of bad values, and each file and key of a
saved adapter with each damage of a list.
"""

import dataclasses
import json
import random
import shutil
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertModel

from svdtune import SVDScaleShiftConfig, hotswap_adapter

NAN, INF = float("nan"), float("inf")
BAD_VALUES = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**400, 0.0, 0.5, -0.5, 1e30, NAN, INF, -INF),
    *("", "x", "query", "none", ".*query", "(", "(?P<a>", "\0", "\ud800", "ключ", "a" * 5000, "../..", "[" * 2000),
    *(
        [],
        [None],
        [0],
        [-1],
        [10**6],
        ["query"],
        [""],
        [["query"]],
        ["(x"],
        ["query"] * 3,
        [True],
        [1.5],
        ["0"],
        [NAN],
    ),
    *({}, {"query": 3}, {"query": 0}, {"": 1}, {"(": 1}, {1: 2}, {"query": None}, {"query": "x"}, {"query": [0]}),
    *(
        {"embeddings.word_embeddings": [0, 10**6]},
        {"query": NAN},
        {"query": [NAN] * 8},
        {"query": {}},
        {"a": {"b": {}}},
    ),
    *((), ("query",), {"query"}, b"query", 1j, object(), int, range(3)),
]
FIELDS = [field.name for field in dataclasses.fields(SVDScaleShiftConfig)]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Some of the values are names of folders to make."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def bert():
    torch.manual_seed(5)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertModel(BertConfig(**size, vocab_size=30, initializer_range=0.2)).eval()


def short(value):
    return f"{value!r:.40}"


@pytest.mark.parametrize("name", FIELDS)
def test_a_config_works_or_is_refused_in_words(name):
    """A ValueError or TypeError that is no accident of Python's: it speaks of the field, or of a module by name."""
    silent = []
    for value in BAD_VALUES:
        choices = {"target_modules": ["query", "value"], name: value}
        if name == "layers_pattern":
            choices["layers_to_transform"] = [0]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(bert(), SVDScaleShiftConfig(**choices))
                model(torch.tensor([[1, 2, 3]]))
        except (ValueError, TypeError) as error:
            if "\n" in str(error).strip() or not speaks_of(name, str(error)):
                silent.append((short(value), type(error).__name__, str(error)))
        except Exception as error:
            silent.append((short(value), type(error).__name__, str(error)[:200]))
    assert not silent, "\n".join(map(str, silent))


def speaks_of(name, message):
    known = (f"`{name}`", f"`{name}[", f"{name}=", f"{name}:", name, name.replace("_", " "))
    return any(form in message for form in known) or "cannot be tuned" in message or "arget modules" in message


# Adapters in a folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A trained adapter's folder, with A, B, a module and tokens that are trained whole; and what it computes."""
    folder = tmp_path_factory.mktemp("adapter")
    choices = {"modules_to_save": ["pooler"], "trainable_token_indices": [3, 5], "rank_pattern": {".*value": 5}}
    model = get_peft_model(bert(), SVDScaleShiftConfig(target_modules=["query", "value"], **choices))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder, model.eval()(TOKENS).last_hidden_state


TOKENS = torch.tensor([[1, 3, 5, 7]])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load(folder):
    return PeftModel.from_pretrained(bert(), str(folder))


def swap_into(folder):
    model = load(folder.parent / "original")
    hotswap_adapter(model, str(folder))
    return model


def outcome(folder, expected, load=load):
    """ "refused", "warned", "right", or what went wrong."""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            output = load(folder).eval()(TOKENS).last_hidden_state
    except (ValueError, TypeError) as error:
        return "refused" if str(error).strip() and "\n" not in str(error) else f"said {error!r:.200}"
    except (KeyError, RecursionError) as error:
        # PEFT reads the JSON, and looks the method up, before the method is asked.
        before = "peft_type" in str(error) or "JSON" in str(error) or str(error).isupper()
        return "refused" if before else f"said {error!r:.200}"
    except RuntimeError as error:
        return "refused" if "size mismatch" in str(error) else f"said {error!r:.200}"
    except Exception as error:
        return f"said {error!r:.200}"
    if torch.allclose(output, expected, atol=1e-6):
        return "right"
    ours = [str(warning.message) for warning in told if "adapter" in str(warning.message).lower()]
    return "warned" if ours else f"wrong in silence by {(output - expected).abs().max():.2g}"


FILE_DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(1000)),
    "a huge header": lambda path: path.write_bytes(b"\xff" * 7 + b"\x7f" + b"{}" * 50),
    "deep JSON": lambda path: path.write_text("[" * 100_000 + "]" * 100_000),
    "a list": lambda path: path.write_text("[]"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a circle of links": lambda path: (path.unlink(), path.symlink_to(path)),
}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("damage", FILE_DAMAGES.values(), ids=FILE_DAMAGES)
@pytest.mark.parametrize("load", [load, swap_into])
def test_a_damaged_file_is_refused(name, damage, load, original, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, expected = original
    for copy in ("original", "damaged"):
        shutil.copytree(folder, tmp_path / copy)
    damage(tmp_path / "damaged" / name)
    assert outcome(tmp_path / "damaged", expected, load) == "refused"


JSON_VALUES = [value for value in BAD_VALUES if isinstance(value, (type(None), bool, int, float, str, list, dict))]


@pytest.mark.parametrize("key", sorted({*FIELDS} - {"peft_type"}))
def test_a_damaged_key_is_refused_or_changes_nothing(key, original, tmp_path):
    folder, expected = original
    shutil.copytree(folder, tmp_path / "damaged")
    content = json.loads((folder / CONFIG).read_text())
    outcomes = {}
    for number, value in enumerate([*JSON_VALUES, "no value"]):
        damaged = {**content, key: value}
        if number == len(JSON_VALUES):
            damaged.pop(key)
        (tmp_path / "damaged" / CONFIG).write_text(json.dumps(damaged))
        outcomes[short(value)] = outcome(tmp_path / "damaged", expected)
    assert {value: found for value, found in outcomes.items() if found not in ("refused", "warned", "right")} == {}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("load", [load, swap_into])
def test_no_flipped_bit_is_silent(name, load, original, tmp_path):
    folder, expected = original
    for copy in ("original", "damaged"):
        shutil.copytree(folder, tmp_path / copy)
    whole = (folder / name).read_bytes()
    positions = random.Random(1).sample(range(8 * len(whole)), 60)
    outcomes = {}
    for position in positions:
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        (tmp_path / "damaged" / name).write_bytes(flipped)
        outcomes[position] = outcome(tmp_path / "damaged", expected, load)
    assert {
        position: found for position, found in outcomes.items() if found not in ("refused", "warned", "right")
    } == {}

"""The decomposition cache: files are found again, never wrong, never incomplete, and limited in size."""

import multiprocessing
import os
import time

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from svdtune import SVDScaleShiftConfig, cache, spectrum
from svdtune.kinds import Linear
from svdtune.spectrum import Spectrum, fingerprint_distance

MATRICES = {
    torch.float32: torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(1)),
    torch.bfloat16: torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(1)).bfloat16(),
}


@pytest.fixture
def decompositions(monkeypatch):
    """How many times something was decomposed."""
    calls = []
    decompose = spectrum.decompose
    monkeypatch.setattr(spectrum, "decompose", lambda matrices: calls.append(1) or decompose(matrices))
    return calls


def same(one, other):
    names = ("left", "right", "singular_values", "reciprocals")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names) and (
        one.fingerprint(one.rank) == other.fingerprint(other.rank)
    )


def files(folder):
    """Those of decompositions; the folder's tag is no such file."""
    return list(folder.glob("*.safetensors"))


@pytest.mark.parametrize("choices", [{}, {"rank": 5}, {"sides": "left"}, {"sides": "right"}], ids=str)
def test_what_was_decomposed_once_is_found_again(choices, dtype, tmp_path, decompositions):
    first = Spectrum(MATRICES[dtype], cache=tmp_path, **choices)
    again = Spectrum(MATRICES[dtype].clone(), cache=tmp_path, **choices)
    assert len(decompositions) == 1
    assert same(first, again)
    assert same(first, Spectrum(MATRICES[dtype], **choices))


def test_another_weight_or_request_is_decomposed_for_itself(tmp_path, decompositions):
    matrices = MATRICES[torch.float32]
    changed = matrices.clone()
    changed[1, 39, 23] = torch.nextafter(changed[1, 39, 23], torch.tensor(9.0))
    for other in (matrices, changed, matrices.double(), matrices.view(2, 24, 40), matrices[:1]):
        assert same(Spectrum(other, cache=tmp_path), Spectrum(other))
    for choices in ({"rank": 5}, {"rank": 6}, {"sides": "left"}):
        assert same(Spectrum(matrices, cache=tmp_path, **choices), Spectrum(matrices, **choices))
    assert len(files(tmp_path)) == 8


def test_a_cached_layer_is_used_as_any_other(tmp_path):
    x, base_layer = torch.randn(3, 40), nn.Linear(40, 24)
    layers = [Linear(base_layer, "default", SVDScaleShiftConfig(svd_cache=str(tmp_path))) for _ in range(2)]
    outputs = [layer.bfloat16()(x.bfloat16()) for layer in layers]
    assert torch.equal(*outputs)
    assert len(files(tmp_path / cache.FOLDER)) == 1


def test_the_environment_names_the_cache_unless_the_config_does(tmp_path, monkeypatch):
    assert cache.cache_folder(None) is None
    monkeypatch.setenv("SVDTUNE_CACHE", str(tmp_path / "environment"))
    assert cache.cache_folder(None).parent == tmp_path / "environment"
    assert cache.cache_folder(str(tmp_path / "config")).parent == tmp_path / "config"
    Linear(nn.Linear(4, 3), "default", SVDScaleShiftConfig())
    assert len(files(tmp_path / "environment" / cache.FOLDER)) == 1


def test_the_folder_of_one_machine_is_not_saved_with_the_adapter():
    assert "svd_cache" not in SVDScaleShiftConfig(svd_cache="/somewhere").to_dict()


def rewritten(**changes):
    """A file with other tensors, and a digest that is right for them."""

    def rewrite(data):
        tensors = load(data)
        tensors.update({name: change(tensors[name]) for name, change in changes.items()})
        return save(tensors, metadata={"digest": cache.digest_of_all(tensors)})

    return rewrite


def with_a_bit_flipped_in(name):
    def flip(data):
        tensors = load(data)
        position = data.index(tensors[name].numpy().tobytes()) + 30
        return data[:position] + bytes([data[position] ^ 8]) + data[position + 1 :]

    return flip


DAMAGES = {
    "truncated": lambda data: data[:-9],
    "empty": lambda data: b"",
    "something else": lambda data: b"\xff" * len(data),
    "a bit of U": with_a_bit_flipped_in("left"),
    "a bit of S": with_a_bit_flipped_in("singular_values"),
    "no digest": lambda data: save(load(data)),
    "planted NaN": rewritten(left=lambda left: left * float("nan")),
    "planted shape": rewritten(right=lambda right: right[:, :, :-1].contiguous()),
    "planted dtype": rewritten(singular_values=lambda values: values.float()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_made_anew_with_a_warning(damage, tmp_path, decompositions):
    Spectrum(MATRICES[torch.float32], cache=tmp_path)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match=f"{path} is damaged"):
        again = Spectrum(MATRICES[torch.float32], cache=tmp_path)
    assert len(decompositions) == 2
    assert same(again, Spectrum(MATRICES[torch.float32]))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_a_fingerprint_is_of_the_vectors_in_use(sides, tmp_path):
    """Files with a right digest and other vectors: whoever can write to the cache can make one."""
    matrices = MATRICES[torch.float32]
    whole = Spectrum(matrices, sides=sides, cache=tmp_path)
    (path,) = files(tmp_path)
    name = "right" if sides == "right" else "left"
    path.write_bytes(rewritten(**{name: lambda vectors: vectors.roll(1, 1)})(path.read_bytes()))
    planted = Spectrum(matrices, sides=sides, cache=tmp_path)
    assert fingerprint_distance(whole.fingerprint(24), planted.fingerprint(24)) > 0.1


# The folder


def test_a_folder_of_somebodys_models_is_left_as_it_is(tmp_path, monkeypatch):
    """It is named as the cache, and more is in it than a cache may hold."""
    model = tmp_path / "model.safetensors"
    named_like_ours = tmp_path / f"{'0' * 64}.safetensors"
    for path in (model, named_like_ours):
        path.write_bytes(b"weights")
        os.utime(path, (1000, 1000))
    monkeypatch.setattr(cache, "MAXIMUM_BYTES", 0)
    monkeypatch.setenv("SVDTUNE_CACHE", str(tmp_path))
    for _ in range(2):
        Linear(nn.Linear(4, 3), "default", SVDScaleShiftConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        named_like_ours.name,
        "model.safetensors",
        cache.FOLDER,
    ]
    assert {path.read_bytes() for path in (model, named_like_ours)} == {b"weights"}


def test_in_its_own_folder_it_removes_only_what_it_wrote(room_for_three, tmp_path):
    others = [tmp_path / name for name in ("model.safetensors", "a.unfinished", "f" * 64)]
    outside = tmp_path.parent / "outside.safetensors"
    link = tmp_path / f"{'0' * 64}.safetensors"
    for path in (*others, outside):
        path.write_bytes(b"somebody's")
        os.utime(path, (1000, 1000))
    link.symlink_to(outside)
    os.utime(link, (1000, 1000), follow_symlinks=False)
    Spectrum(room_for_three[3], cache=tmp_path)
    assert len(files(tmp_path)) == 3 + 2
    assert all(path.read_bytes() == b"somebody's" for path in (*others, outside, link))


@pytest.mark.parametrize("fault", ["files of others", "writable by all", "below a file"])
def test_a_folder_that_cannot_be_its_own_is_not_used(fault, tmp_path):
    folder = tmp_path / "folder"
    if fault == "below a file":
        folder.write_text("no folder")
        folder = folder / "cache"
    else:
        folder.mkdir()
    if fault == "files of others":
        (folder / "notes.txt").write_text("mine")
    if fault == "writable by all":
        folder.chmod(0o777)
    with pytest.warns(UserWarning, match=r"is not used.*SVDTUNE_CACHE"):
        found = Spectrum(MATRICES[torch.float32], cache=folder)
    assert same(found, Spectrum(MATRICES[torch.float32]))
    assert not files(folder)


@pytest.fixture
def room_for_three(tmp_path, monkeypatch):
    """Four weights, the first three of them in the cache, the first one least recently used."""
    weights = torch.randn(4, 1, 40, 24)
    for index, weight in enumerate(weights[:3]):
        before = set(files(tmp_path))
        Spectrum(weight, cache=tmp_path)
        (path,) = set(files(tmp_path)) - before
        os.utime(path, (1000 + index, 1000 + index))
    monkeypatch.setattr(cache, "MAXIMUM_BYTES", int(3.5 * path.stat().st_size))
    return weights


def test_the_least_recently_used_files_go_first(room_for_three, tmp_path, decompositions):
    Spectrum(room_for_three[0], cache=tmp_path)  # used again, so the second is the one that was not for longest
    Spectrum(room_for_three[3], cache=tmp_path)
    assert len(files(tmp_path)) == 3

    decompositions.clear()
    for index in (0, 2, 3):
        Spectrum(room_for_three[index], cache=tmp_path)
    assert not decompositions
    Spectrum(room_for_three[1], cache=tmp_path)
    assert len(decompositions) == 1


def test_a_model_too_large_for_the_cache_finds_the_part_that_is_in_it(room_for_three, tmp_path, decompositions):
    for _ in range(3):
        decompositions.clear()
        for weight in room_for_three:
            Spectrum(weight, cache=tmp_path)
    assert len(decompositions) == 1


def test_a_cache_that_others_fill_is_read_and_one_that_is_shared_can_be(tmp_path, monkeypatch, decompositions):
    Spectrum(MATRICES[torch.float32], cache=tmp_path)
    (path,) = files(tmp_path)
    umask = os.umask(0o022)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask

    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    Spectrum(MATRICES[torch.float32], cache=tmp_path)
    assert len(decompositions) == 1


def test_what_killed_writers_left_is_swept_away_and_what_others_write_is_not(tmp_path):
    left, in_work = (tmp_path / f"{letter * 64}.x1_.unfinished" for letter in "ab")
    Spectrum(MATRICES[torch.float32], cache=tmp_path)
    for path, age in ((left, 2 * 24 * 60 * 60), (in_work, 60)):
        path.write_bytes(b"...")
        os.utime(path, (time.time() - age,) * 2)
    Spectrum(MATRICES[torch.bfloat16], cache=tmp_path)
    assert not left.exists()
    assert in_work.exists()


def fill(folder, seed):
    torch.set_num_threads(1)
    matrices = torch.randn(6, 1, 24, 40, generator=torch.Generator().manual_seed(0))
    for round_number in range(20):
        for index in torch.randperm(6, generator=torch.Generator().manual_seed(100 * seed + round_number)):
            assert same(Spectrum(matrices[index], cache=folder), Spectrum(matrices[index]))
            if seed == 0:
                for path in folder.glob("*.safetensors"):
                    path.unlink(missing_ok=True)


def test_several_processes_write_read_and_remove_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_file_in_use_may_be_truncated_or_overwritten(tmp_path):
    Spectrum(MATRICES[torch.float32], cache=tmp_path)
    again = Spectrum(MATRICES[torch.float32], cache=tmp_path)
    (path,) = files(tmp_path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert same(again, Spectrum(MATRICES[torch.float32]))
    with path.open("r+b") as file:
        file.truncate(10)
    assert same(again, Spectrum(MATRICES[torch.float32]))


def test_a_cache_works_without_a_umask_a_tag_or_a_home(tmp_path, monkeypatch, decompositions):
    before = os.umask(0)
    try:
        Spectrum(MATRICES[torch.float32], cache=tmp_path / "cache")
        (tmp_path / "cache" / cache.TAG_FILE).unlink()
        (tmp_path / "cache" / ".DS_Store").write_bytes(b"a system's")
        Spectrum(MATRICES[torch.float32], cache=tmp_path / "cache")
    finally:
        os.umask(before)
    assert len(decompositions) == 1
    monkeypatch.setenv("SVDTUNE_CACHE", "~nobody-of-that-name/cache")
    with pytest.warns(UserWarning, match="is not used: Could not determine home directory"):
        assert cache.cache_folder(None) is None

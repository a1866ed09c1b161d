"""Two processes with gloo on the CPU train the same values as one process, under each distributed wrapper."""

import os

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification

from svdtune import SVDScaleShiftConfig

# Enough rows that square layers are rebuilt (`forms.choose`) from the base weight, which FSDP shards.
STEPS, BATCH, TOKENS = 5, 32, 7


def in_two_processes(function, *arguments):
    """Runs ``function(rank, *arguments)`` in two forks of this process; an error of one is raised here."""
    start_processes(_connected, (function, arguments), nprocs=2, start_method="fork")


def _connected(rank, function, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["SVDTUNE_TEST_PORT"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    function(rank, *arguments)
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def free_port(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("SVDTUNE_TEST_PORT", str(store.port))


def base_model():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=2, initializer_range=0.02, **size, **dropout))


def tuned_model(train):
    config = SVDScaleShiftConfig(target_modules="all-linear", task_type="SEQ_CLS")
    return train(get_peft_model(base_model(), config)).train()


def batches(part=slice(None)):
    """The same batches in each process, or one part of each."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        tokens = torch.randint(50, (BATCH, TOKENS), generator=generator)
        yield {"input_ids": tokens[part], "labels": tokens[part, 0] % 2}


def optimizer_of(model):
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.02)


def trained(model, optimizer, part=slice(None), backward=torch.Tensor.backward):
    """The losses of a few steps."""
    losses = []
    for batch in batches(part):
        loss = model(**batch).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def check_against_one_process(rank, train, model, losses, folder):
    """Compares losses and adapter with those of one process, the adapter as its file says after loading it again."""
    dist.all_reduce(losses)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank != 0:
        return
    alone = tuned_model(train)
    untrained = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(alone).items()}
    expected = trained(alone, optimizer_of(alone))
    assert expected[-1] < expected[0] - 0.01
    torch.testing.assert_close(losses / 2, expected, atol=1e-5, rtol=1e-5)

    model.save_pretrained(folder, state_dict=whole)
    loaded = PeftModel.from_pretrained(base_model(), folder)
    reloaded = get_peft_model_state_dict(loaded)
    for name, tensor in get_peft_model_state_dict(alone).items():
        torch.testing.assert_close(reloaded[name], tensor, atol=1e-4, rtol=1e-4)
        assert not torch.equal(tensor, untrained[name])
    batch = next(batches())
    torch.testing.assert_close(loaded(**batch).logits, alone.eval()(**batch).logits, atol=1e-4, rtol=1e-4)


def half(rank):
    return slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)


def test_ddp(train, tmp_path):
    in_two_processes(_ddp, train, tmp_path)


def _ddp(rank, train, folder):
    model = tuned_model(train)
    wrapped = DistributedDataParallel(model)
    # What is sent to the other process at every step: nothing but what the base model would send.
    assert [buffer.shape for buffer in wrapped.buffers()] == [buffer.shape for buffer in base_model().buffers()]
    losses = trained(wrapped, optimizer_of(model), half(rank))
    check_against_one_process(rank, train, model, losses, folder)


def test_fsdp(train, tmp_path):
    in_two_processes(_fsdp, train, tmp_path)


def _fsdp(rank, train, folder):
    model = tuned_model(train)
    for block in model.base_model.model.bert.encoder.layer:
        fully_shard(block)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    losses = trained(model, optimizer_of(model), half(rank))
    check_against_one_process(rank, train, model, losses, folder)


@pytest.mark.parametrize("cpu_ram_efficient_loading", [False, True])
def test_fsdp_by_accelerate(cpu_ram_efficient_loading, train, tmp_path):
    in_two_processes(_fsdp_by_accelerate, cpu_ram_efficient_loading, train, tmp_path)


def _fsdp_by_accelerate(rank, cpu_ram_efficient_loading, train, folder):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=cpu_ram_efficient_loading,
    )
    accelerator = Accelerator(cpu=True)
    # It knows FSDP on accelerators only.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = tuned_model(train)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    losses = trained(model, optimizer, half(rank), accelerator.backward)
    check_against_one_process(rank, train, model, losses, folder)


def test_fsdp_shards_the_weights_and_not_their_vectors(tmp_path):
    """Each process of a ViT block of width D holds U and V whole: 16 D² values, beside its half of 12 D² weights."""
    in_two_processes(_memory, 768)


def _memory(rank, width):
    sizes = {"qkv": (width, 3 * width), "proj": (width, width), "fc1": (width, 4 * width), "fc2": (4 * width, width)}
    block = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
    model = get_peft_model(block, SVDScaleShiftConfig(target_modules=list(sizes)))
    fully_shard(model)
    layers = [model.base_model.model[name] for name in sizes]
    weights = sum(layer.base_layer.weight.to_local().nbytes for layer in layers)
    vectors = sum(tensor.nbytes for layer in layers for tensor in (layer.spectrum.left, layer.spectrum.right))
    assert weights == 12 * width**2 * 4 / 2
    assert vectors == 16 * width**2 * 4


@pytest.mark.parametrize("choices", [{}, {"one_sided": True}, {"rank": 3}], ids=str)
def test_vectors_follow_the_base_weight_that_ddp_sends(choices, train, paper_weight, relative_error):
    """Processes without a common seed have base weights of their own until DDP sends those of the first."""
    in_two_processes(_with_another_base, choices, train, paper_weight, relative_error)


def _with_another_base(rank, choices, train, paper_weight, relative_error):
    torch.manual_seed(rank)
    base = nn.Sequential(nn.Linear(12, 8))
    model = get_peft_model(base, SVDScaleShiftConfig(target_modules=["0"], **choices))
    before = model.base_model.model[0].base_layer.weight.clone()
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(7)
    train(model)
    x = torch.randn(5, 12)
    answers = [torch.empty(5, 8) for _ in range(2)]
    dist.all_gather(answers, wrapped(x).detach())
    assert torch.equal(*answers)

    layer = model.base_model.model[0]
    assert torch.equal(layer.base_layer.weight, before) == (rank == 0)
    count, scale, shift = layer.rank["default"], torch.ones(8), torch.zeros(8)
    scale[:count] = layer.svd_scale_shift_scale["default"].detach()
    shift[:count] = layer.svd_scale_shift_shift["default"].detach()
    weight = paper_weight(layer.base_layer.weight, scale, shift)
    assert relative_error(answers[0], x.double() @ weight.T + layer.bias.detach().double()) < 1e-5

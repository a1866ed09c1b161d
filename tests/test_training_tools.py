"""Training with tools of other libraries: checkpointing, compiling, exporting, autocast, transformers' Trainer."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from svdtune import SVDScaleShiftConfig, hotswap_adapter

CONFIG = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}


@pytest.fixture
def base():
    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(num_hidden_layers=1, initializer_range=0.2, attn_implementation="eager", **size, **dropout)
    return BertForSequenceClassification(config)


@pytest.fixture
def model(base, train):
    return train(get_peft_model(copy.deepcopy(base), SVDScaleShiftConfig(**CONFIG)))


@pytest.fixture
def batch():
    tokens = torch.randint(50, (4, 7))
    return {"input_ids": tokens, "labels": tokens[:, 0] % 2}


def gradients(model, batch, forward=None):
    """The loss of a batch, and the gradient of everything that learns."""
    model.zero_grad()
    loss = (model if forward is None else forward)(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def assert_same(actual, expected, **tolerance):
    assert actual.keys() == expected.keys() and len(expected) > 10
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **tolerance)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, model, batch):
    expected = gradients(model.train(), batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.base_model.model.bert.encoder.layer[0].gradient_checkpointing
    assert_same(gradients(model, batch), expected, atol=0, rtol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_may_compute_the_first_forward_in_another_form(use_reentrant, model, batch):
    """A reentrant one runs without gradients, where weights are rebuilt for fewer rows than with them."""
    batch = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in batch.items()}
    expected = gradients(model.train(), batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(gradients(model, batch), expected, atol=1e-6, rtol=1e-4)


@pytest.fixture
def compilations():
    """How many graphs were compiled so far; each broken graph is at least one more."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_one_compiled_graph_serves_all_values(model, base, batch, train, tmp_path, compilations):
    other = get_peft_model(copy.deepcopy(base), SVDScaleShiftConfig(**CONFIG))
    torch.manual_seed(1)
    train(other).save_pretrained(tmp_path)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    second_batch = {name: tensor.roll(1, 0).roll(1, -1) for name, tensor in batch.items()}

    def train_in_place():
        train(model)

    def hotswap():
        hotswap_adapter(model, tmp_path)

    def nothing():
        pass

    for change, inputs in ((nothing, batch), (nothing, second_batch), (train_in_place, batch), (hotswap, batch)):
        before = gradients(model, inputs)["loss"]
        change()
        expected = gradients(model, inputs)
        assert change is nothing or abs(expected["loss"] - before) > 1e-3
        assert_same(gradients(model, inputs, compiled), expected, atol=1e-5, rtol=1e-4)
        assert compilations() == 1
    assert not counters["graph_break"]


def test_a_merged_model_is_exported(model, batch):
    inputs = {"input_ids": batch["input_ids"]}
    expected = model.eval()(**inputs).logits
    program = torch.export.export(model.merge_and_unload(), (), inputs)
    torch.testing.assert_close(program.module()(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    assert not [name for name in program.state_dict if "svd_scale_shift" in name]


def test_autocast_trains_in_bfloat16_what_float32_does(model, batch):
    expected = gradients(model, batch)

    def in_bfloat16(**batch):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**batch)
        assert output.logits.dtype is torch.bfloat16
        return output

    actual = gradients(model, batch, in_bfloat16)
    for name, gradient in expected.items():
        assert actual[name].dtype is torch.float32
        assert (actual[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_trainer_trains_saves_and_goes_on(base, batch, tmp_path):
    base.save_pretrained(tmp_path / "base")
    samples = [{name: tensor[index] for name, tensor in batch.items()} for index in range(4)] * 4

    def trainer(steps):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        model = get_peft_model(loaded, SVDScaleShiftConfig(**CONFIG))
        arguments = TrainingArguments(
            tmp_path / "run",
            max_steps=steps,
            save_steps=3,
            logging_steps=1,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=samples)

    trainer(3).train()
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(6)
    whole.train()
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (resumed, whole)]
    assert losses[0] == losses[1] and losses[1][-1] < 0.5 * losses[1][0]

    resumed.save_model(tmp_path / "adapter")
    expected = resumed.model.eval()(**batch).logits
    for loaded in (
        PeftModel.from_pretrained(base, tmp_path / "adapter"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter"),
    ):
        torch.testing.assert_close(loaded.eval()(**batch).logits, expected, atol=1e-6, rtol=1e-5)


def test_transformers_own_methods_switch_adapters(base, batch, train, tmp_path):
    outputs = {}
    for name in ("one", "two"):
        model = train(get_peft_model(copy.deepcopy(base), SVDScaleShiftConfig(target_modules="all-linear"))).eval()
        outputs[name] = model(**batch).logits
        model.save_pretrained(tmp_path / name)
    outputs["none"] = base.eval()(**batch).logits

    for name in ("one", "two"):
        base.load_adapter(tmp_path / name, adapter_name=name)
    base.add_adapter(SVDScaleShiftConfig(target_modules=["query"]), adapter_name="none")
    for name in ("one", "none", "two"):
        base.set_adapter(name)
        torch.testing.assert_close(base(**batch).logits, outputs[name], atol=1e-5, rtol=1e-4)
    base.disable_adapters()
    assert torch.equal(base(**batch).logits, outputs["none"])

"""The tuned model: PEFT's interface for adding, saving, loading and combining adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from svdtune.adapter_state import (
    check_fingerprints,
    check_values,
    file_keys,
    fingerprints_of,
    fully_trained_tensors,
)
from svdtune.arithmetic import (
    check_combination,
    combine_deltas,
    combined_config,
    count_shared_modules_to_save,
)
from svdtune.choices import check_counts, check_token_rows, expressions_of
from svdtune.config import SVDScaleShiftConfig
from svdtune.digests import Measurement, digest_of_each
from svdtune.expressions import check_time
from svdtune.files import CHOICES, check_digests
from svdtune.layer import SVDScaleShiftLayer
from svdtune.learned import LearnedVector, in_present_format
from svdtune.mixed_batch import adapter_of_each_sample
from svdtune.places import Place, find_twins, shared_places
from svdtune.targets import DEFAULT_TARGET_MODULES, default_by_class
from svdtune.wrapping import new_layer, update_existing_layer


class SVDScaleShiftModel(BaseTuner):
    """A model whose target layers train a scale and a shift of their singular values.

    `peft.get_peft_model` creates it from an `SVDScaleShiftConfig`, which describes all settings.

    Example:

        >>> from peft import get_peft_model
        >>> from svdtune import SVDScaleShiftConfig
        >>> model = get_peft_model(model, SVDScaleShiftConfig(target_modules=["q_proj", "v_proj"]))
        >>> model.print_trainable_parameters()
    """

    prefix: str = "svd_scale_shift_"
    tuner_layer_cls = SVDScaleShiftLayer
    target_module_mapping = DEFAULT_TARGET_MODULES  # type: ignore[assignment]  # PEFT takes regular expressions too
    peft_config: dict[str, SVDScaleShiftConfig]  # type: ignore[assignment]
    # Set only while modules are replaced; see `svdtune/places.py`.
    _places: dict[int, list[Place]] = {}
    _twins: dict[int, list[tuple[str, Place]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter's layers to ``model``.

        Args:
            model: The model to modify in place.
            adapter_name: Name of the adapter, whose config is in ``peft_config``.
            *args: Further arguments of PEFT's own method.
            **kwargs: Further arguments of PEFT's own method.

        Warns:
            UserWarning: if the adapter was trained on another base model; see `check_fingerprints`.

        Raises:
            ValueError: if the config does not fit the model, or if a weight cannot be decomposed.
            TypeError: if a target module has an unsupported type.
        """
        config = self.peft_config[adapter_name]
        check_time(expressions_of(config), (name for name, _ in model.named_modules()))
        check_token_rows(config, model)
        if config.read_from_file:
            check_counts(config, model)
        with self._replace_everywhere(model):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]  # PEFT may have replaced it
        check_fingerprints(model, adapter_name, config)
        if not config.inference_mode:
            # Training continues on the weights of this model, so the saved records no longer apply.
            config.fingerprints, config.digests = None, None

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        """Sets the default targets. A config with ``target_parameters`` needs none."""
        model_type = model_config.get("model_type")  # None for diffusers' configs
        if model_type not in self.target_module_mapping:
            if peft_config.target_parameters:
                return peft_config
            if peft_config.target_modules is None:
                peft_config.target_modules = default_by_class(self.model)
        return super()._prepare_adapter_config(peft_config, {**model_config, "model_type": model_type})

    def _create_and_replace(  # type: ignore[override]  # PEFT passes our own config
        self,
        config: SVDScaleShiftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        key = get_pattern_key(list(config.rank_pattern), current_key)
        options = {
            "adapter_name": adapter_name,
            "config": config,
            "rank_pattern_key": key if key in config.rank_pattern else None,
        }
        if not update_existing_layer(target, parameter_name, **options):
            quantization_options = get_quantization_kwargs(self.model)
            new_module = new_layer(target, current_key, parameter_name, quantization_options, **options)
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)
            self._replace_module(parent, target_name, new_module, target)
            for name, (twin_parent, twin_name) in self._twins.get(id(target), ()):
                matched = self._check_target_module_exists(config, name)
                if matched is None or matched is False:  # not a target itself, and not excluded by name
                    setattr(twin_parent, twin_name, new_module)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        with self._replace_everywhere(self.model):
            return super()._unload_and_optionally_merge(*args, **kwargs)

    @contextmanager
    def _replace_everywhere(self, model: nn.Module) -> Iterator[None]:
        """A context in which a module is replaced under all its parents, and its twins with it."""
        self._places, self._twins = shared_places(model), find_twins(model)
        try:
            yield
        finally:
            self._places, self._twins = {}, {}

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Override PEFT's method, which does two wrong things here. It moves a new layer to the device of an offloaded
        # weight, although the layer is already on the right device. It also sets `weight` on a restored module, which
        # HQQ's layers do not have.
        setattr(parent, child_name, new_module)
        for other_parent, name in self._places.get(id(child), ()):
            setattr(other_parent, name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Casts A and B to the dtype of the base weight if ``autocast_adapter_dtype`` is False; else keeps float32."""
        if not autocast_adapter_dtype:
            for module in self.modules():
                if isinstance(module, SVDScaleShiftLayer):
                    module.cast_adapter(adapter_name, module.spectrum.dtype)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        """Returns the tensors to save, and stores fingerprints and digests in the config, which PEFT saves next."""
        saved = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        whole = fully_trained_tensors(model, adapter_name, kwargs["state_dict"])
        in_file = {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in saved.items()}
        config.measured_fingerprints = fingerprints_of(model, adapter_name)
        config.measured = Measurement({**in_file, **whole}, {CHOICES: config.digest_of_choices()})
        config.unchecked_digests = {}  # superseded by the values in the model
        return saved

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Renames the tensors of an adapter file to the names in the model, and checks that they are complete."""
        digests, config.unchecked_digests = config.unchecked_digests, {}
        if digests:
            in_file = file_keys(model, adapter_name)
            given = {in_file.get(key, key): tensor for key, tensor in state_dict.items()}
            check_digests(f"The adapter {adapter_name!r}", digest_of_each(given), digests)
        present = in_present_format(state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, present)
        check_values(model, adapter_name, config, remapped)
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Passes ``adapter_names`` of a mixed batch to the layers. The base model's forward does not accept them."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        with adapter_of_each_sample(self.model, adapter_names, kwargs.get("num_beams") or 1):
            yield

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Adds a new adapter that is a weighted combination of others.

        The linear combination is exact: it changes each weight by the weighted sum of the adapters' changes (see
        `svdtune/arithmetic.py`).

        Args:
            adapters: Names of the adapters to combine.
            weights: One weight per adapter; may be negative.
            adapter_name: Name of the new adapter.
            combination_type: "linear", "ties", "dare_linear", "dare_ties" or "magnitude_prune". PEFT's functions of
                these names are applied to the changes of the singular values.
            density: Fraction of values to keep, in (0, 1]. All types except "linear" need it.
            majority_sign_method: "total" or "frequency", for "ties" and "dare_ties".

        Warns:
            UserWarning: if an adapter has fully trained modules or tokens, which are not combined.

        Raises:
            ValueError: if an adapter or the combination is unknown, the new name is taken, or the number of weights is
                wrong. Also if several adapters have a copy of one module in ``modules_to_save``.
        """
        check_combination(combination_type, density, majority_sign_method)
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters:
            raise ValueError(
                f"There is no adapter {', '.join(unknown) or 'to combine'}; there are {', '.join(self.peft_config)}."
            )
        if len(adapters) != len(weights):
            raise ValueError(f"{len(adapters)} adapters need as many weights, not {len(weights)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already. Choose another name.")

        shared = count_shared_modules_to_save(self.model, adapters)
        if shared:
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                f"{shared} such instance(s)."
            )

        layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, SVDScaleShiftLayer) and any(layer.has_adapter(adapter) for adapter in adapters)
        }
        self.peft_config[adapter_name] = combined_config(
            [self.peft_config[adapter] for adapter in adapters], adapters, layers
        )
        self.inject_adapter(self.model, adapter_name)
        for layer in layers.values():
            ours = [
                (adapter, weight)
                for adapter, weight in zip(adapters, weights, strict=True)
                if layer.has_adapter(adapter)
            ]
            changes = [layer.delta_of(adapter) for adapter, _ in ours]
            weight_vector = torch.tensor([weight for _, weight in ours], device=changes[0].device)
            combined = combine_deltas(
                changes, weight_vector, combination_type, 1.0 if density is None else density, majority_sign_method
            )
            vector = cast(LearnedVector, layer.svd_scale_shift_b[adapter_name])
            vector.weight.data = layer.spectrum.leading(combined, layer.rank[adapter_name])
        self.set_requires_grad(adapter_name, False)

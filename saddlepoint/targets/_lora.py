"""LoRA adapters beside a model whose weights stay as they are: many share them, and each row of a batch may have its own.

The low ranks of all adapters of a batch stand side by side in two matrices for each layer, so that a step takes two products more
and not two for each adapter; a mask leaves each row the ranks that are its own. A base's row has none.

Source: Hu et al. 2021, "LoRA", https://arxiv.org/abs/2106.09685
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saddlepoint.errors import ModelError

WEIGHTS = "adapter_model.safetensors"
_PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None, "fan_in_fan_out": False}
_PLAIN |= {"target_parameters": None, "trainable_token_indices": None, "layer_replication": None}


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter adds: for each linear layer by its name, the input times `down` times `up`.

    Args:
        layers: (down, up) of shapes (rank, in) and (out, rank), in the model's dtype; `up` holds the scale.
    """

    layers: dict[str, tuple[Tensor, Tensor]]


def read(folder: Path, model: Any) -> Adapter:
    """The adapter of a folder with adapter_config.json and adapter_model.safetensors, as peft writes them, for `model`.

    Raises:
        ModelError: There is none, it is more than LoRA on linear layers, or it belongs to another model.
    """
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key
    from safetensors.torch import load_file

    # peft would go on to look for other files here, or on the hub
    for needed in ("adapter_config.json", WEIGHTS):
        if not (folder / needed).is_file():
            raise ModelError(f"'{folder}' cannot be loaded: it holds no {needed}; give a LoRA adapter's folder")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        found = load_file(folder / WEIGHTS)
        odd = [f"{key}={getattr(config, key)!r}" for key, plain in _PLAIN.items() if (getattr(config, key, None) or plain) != plain]
    except Exception as wrong:  # a broken file raises what its parser raises
        raise ModelError(f"'{folder}' cannot be loaded: {str(wrong).splitlines()[0]}") from wrong
    if odd or config.peft_type != "LORA":
        raise ModelError(f"'{folder}' cannot be served beside its base: {', '.join(odd) or config.peft_type}; merge it into a whole model")
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    layers = {}
    for key in [key for key in found if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        down, up = found.pop(key), found.pop(key.replace("lora_A", "lora_B"), torch.empty(0))
        layer, rank = linear.get(name), len(down)
        if layer is None or down.shape != (rank, layer.in_features) or up.shape != (layer.out_features, rank):
            raise ModelError(
                f"'{folder}' is no adapter of this model: '{name}' does not fit; serve it with the base that it was trained on"
            )
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        scale = alpha / (rank**0.5 if config.use_rslora else rank)
        layers[name] = down.to(layer.weight), (up.float() * scale).to(layer.weight)
    if found or not layers:
        raise ModelError(f"'{folder}' cannot be served: {next(iter(found), 'no layer')} is not of LoRA on linear layers; merge it")
    return Adapter(layers)


class _Lora(nn.Module):
    """A linear layer, and what adapters add to it.

    Attributes:
        down, up: (ranks, in) and (out, ranks), of all adapters one after the other; None where there are none.
        mask: (rows, 1, ranks), 1 where a rank is of the row's own adapter; None where all are.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.down: Tensor | None = None
        self.up: Tensor | None = None
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.linear(x)
        if self.down is None or self.up is None:
            return made
        low = F.linear(x, self.down)
        return made + F.linear(low if self.mask is None else low * self.mask, self.up)


def _twin(model: Any, names: Iterable[str]) -> tuple[Any, dict[str, _Lora]]:
    """A model with the same tensors in modules of its own, some of which can take adapters, and those."""
    twin = deepcopy(model, {id(shared): shared for shared in (*model.parameters(), *model.buffers())})
    made = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        made[name] = _Lora(twin.get_submodule(name))
        setattr(twin.get_submodule(parent), own, made[name])
    return twin, made


def adapted(model: Any, adapter: Adapter) -> Any:
    """A model with the weights of `model`, which are shared, and an adapter."""
    twin, layers = _twin(model, adapter.layers)
    for name, layer in layers.items():
        layer.down, layer.up = adapter.layers[name]
    return twin


class Mixture:
    """A model with the weights of another, whose rows may each have an adapter of their own.

    Used by one thread at a time: what it computes depends on what was chosen last.
    """

    def __init__(self, model: Any):
        self._bare = model
        self._twin, self._layers = _twin(model, [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)])
        self._stacked: list[Adapter] = []
        self._stack: dict[str, tuple[Tensor, Tensor]] = {}
        self._chosen: list[Adapter | None] = []  # the rows that the layers are set for

    def hold(self, adapters: Iterable[Adapter | None]) -> None:
        """Have these adapters ready. Others stay beside them while they are few, for stacking copies all of them."""
        wanted = list(dict.fromkeys(a for a in adapters if a is not None))
        if set(wanted) <= set(self._stacked) and len(self._stacked) <= 2 * len(wanted) + 1:
            return
        self._stacked, self._stack, self._chosen = wanted, {}, []
        for name in self._layers:
            if own := [a.layers[name] for a in wanted if name in a.layers]:
                self._stack[name] = torch.cat([down for down, _ in own]), torch.cat([up for _, up in own], dim=1)

    def chosen(self, rows: Sequence[Adapter | None]) -> Any:
        """The model for a batch whose rows have these adapters, of those that are held, or none."""
        if not any(rows):
            return self._bare
        if list(rows) != self._chosen:
            self._chosen = list(rows)
            if rows[0] is not None and len(set(rows)) == 1:  # such as a prompt: only its own ranks
                for name, layer in self._layers.items():
                    layer.down, layer.up = rows[0].layers.get(name, (None, None))
                    layer.mask = None
            else:
                self._mix(rows)
        return self._twin

    def _mix(self, rows: Sequence[Adapter | None]) -> None:
        masks: dict[tuple[int, ...], Tensor] = {}
        for name, layer in self._layers.items():
            layer.down, layer.up = self._stack.get(name, (None, None))
            if layer.down is None:
                continue
            ranks = tuple(len(a.layers[name][0]) if name in a.layers else 0 for a in self._stacked)
            if ranks not in masks:
                mine = torch.tensor([[row is a for a in self._stacked] for row in rows], dtype=layer.down.dtype, device=layer.down.device)
                masks[ranks] = mine.repeat_interleave(torch.tensor(ranks, device=mine.device), 1)[:, None]
            layer.mask = masks[ranks]

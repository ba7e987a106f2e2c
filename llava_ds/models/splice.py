"""The step from patch features and token ids to the LLM's input, as a module that ZeRO-3 can gather weights around."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from llava_ds.models.projector import split_projector
from llava_ds.ops.project_splice import project_splice
from llava_ds.schema import RowPlan


class Splice(nn.Module):
    """The projector's last layer and the word embeddings in one operation (``project_splice``).

    The weights belong to the projector and to the LLM of ``model``. They are neither parameters nor submodules of this
    module, so that no name stands twice in a state_dict, and they are looked up anew in every call, so that moved,
    copied, loaded, resized and replaced layers work. Under ZeRO-3 the engine registers ``external_parameters``: they
    are whole while this module runs, and at no other time.

    An embedding that does more than look rows up (Gemma's scales them, LoRA adds to them, a hook changes them) is
    called instead, and its rows take the place of the table.
    """

    def __init__(self, model: Any, fused: bool = False) -> None:
        super().__init__()
        self._owner = (model,)  # in a tuple, as nn.Module would take a module for a submodule
        self.fused = fused

    def external_parameters(self) -> list[nn.Parameter]:
        """The parameters of other modules that ``forward`` reads."""
        linear, embedding = self._layers()
        tables = [embedding.weight] if _only_looks_up(embedding) else []
        return [weight for weight in (linear.weight, linear.bias, *tables) if weight is not None]

    def forward(self, patch_features: torch.Tensor, input_ids: torch.Tensor, plan: RowPlan) -> torch.Tensor:
        """[I, P, C] features of the last layer and [B, S] ids -> [B, S, D], the rows as ``plan`` says.

        Raises:
            ValueError: the plan has image rows, but not as many as there are patches.
            TypeError: the projector's last layer is wrapped or hooked: its weight alone does not say what it does.
        """
        linear, embedding = self._layers()
        num_rows, num_patches = len(plan.image_rows), patch_features.shape[:-1].numel()
        if num_rows not in (0, num_patches):  # none: the batch carries a dummy image
            raise ValueError(f"{num_rows} image rows in the plan but {num_patches} patches; give the plan's own images")
        if _only_looks_up(embedding):
            table = embedding.weight
            if embedding.padding_idx is not None:
                table = _FixedRow.apply(table, embedding.padding_idx)
        else:
            # Image positions hold a negative stand-in; any id will do there.
            table = embedding(input_ids.clamp(min=0)).flatten(0, 1)  # [B, S, D] -> [R, D]
            plan = _plan_of_own_rows(plan)
        # Under autocast the layers before may have given another dtype.
        features = patch_features.to(linear.weight.dtype)
        rows = project_splice(features, linear.weight, linear.bias, table, plan, self.fused)
        return rows.view(*input_ids.shape, rows.shape[-1])

    def _layers(self) -> tuple[nn.Linear, Any]:
        """The projector's last layer and the LLM's embedding, as they are now."""
        (model,) = self._owner
        linear = split_projector(model.projector)[1]
        if not _is_plain(linear, nn.Linear):
            raise TypeError(
                f"the projector's last layer must be an nn.Linear without hooks or wrappers, not {linear}: "
                "its weight is read, and it is never called. Change a layer before it, or take the hook off."
            )
        return linear, model.llm.get_input_embeddings()


class _FixedRow(torch.autograd.Function):
    """A table one row of which gets a gradient of zero, as that of an ``nn.Embedding`` at ``padding_idx`` does."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, row: int) -> torch.Tensor:
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        grad[ctx.row] = 0  # in place: the splice made this gradient for nobody else, and it is as large as the table
        return grad, None


def _only_looks_up(embedding: nn.Module) -> bool:
    """Whether calling an embedding is nothing but an index into its weight, whose gradient adds up the rows."""
    if not isinstance(embedding, nn.Embedding) or not _is_plain(embedding, nn.Embedding):
        return False
    return embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does what its class says, and nothing else.

    accelerate wraps a module by a ``forward`` of the object. DeepSpeed hooks every module to gather its weights: that
    is what ``external_parameters`` are for.
    """
    hooks = chain(
        module._forward_pre_hooks.values(),
        module._forward_hooks.values(),
        module._backward_pre_hooks.values(),
        module._backward_hooks.values(),
    )
    is_hooked = any(not getattr(hook, "__module__", "").startswith("deepspeed.") for hook in hooks)
    return type(module) is kind and not is_hooked and "forward" not in vars(module)


def _plan_of_own_rows(plan: RowPlan) -> RowPlan:
    """The plan over a table that holds row r of the sequence at r; nothing here waits for the device."""
    rows = torch.arange(len(plan.src), device=plan.src.device)
    token_rows = plan.token_rows.sort().values
    return RowPlan(
        src=torch.where(plan.src < 0, plan.src, rows),
        image_rows=plan.image_rows,
        token_ids=token_rows,
        token_starts=torch.arange(len(token_rows) + 1, device=token_rows.device),
        token_rows=token_rows,
    )

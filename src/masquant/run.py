# SPDX-License-Identifier: Apache-2.0
"""One model being quantized, block by block: what `pipeline` does with each decoder block."""

from __future__ import annotations

import gc
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .allocation import Option, options_of
from .block import apply_solutions, group_record, rotate_block, solve_block, stacked_fold, stacked_weight
from .blocks import AbstractBlocks
from .calibration.block_inputs import BlockInputs, HiddenStates
from .calibration.gradients import TokenGradients
from .calibration.statistics import GroupStatistics, InputRanges, collect_statistics, moment_bytes
from .checkpoint.format import Site, parse_site
from .checkpoint.store import BlockStore
from .distributed import from_first, sum_over_processes
from .errors import ModelError
from .measuring import Stages, peak_memory
from .modality import Modality, ModalityState
from .models import core_of, decoder_of, experts_in, linear_of, token_rows
from .original import OriginalGroup, original_groups, plain_errors
from .plan import GroupPlan, Plan, folds_text, group_rotation, site_key
from .progress import AbstractProgress
from .recipe import Recipe
from .refinement import refine_block
from .runtime import MasquantLinear
from .runtime.build import replace_group
from .runtime.linear import Compensation
from .smoothing.learned import TrialLinear, learn_vectors, seen_ids
from .smoothing.scales import smooth_scale
from .solver import GroupSolution, added_bytes
from .spending import UNLIMITED, Spending, loss_per_error


def restore_dtype(block: nn.Module, dtype: torch.dtype) -> None:
    """Back to the model's dtype: all but the quantized linears, whose buffers have their own."""
    for module in block.modules():
        if not isinstance(module, MasquantLinear | Compensation):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)


@dataclass
class Run:
    """One model being quantized, block by block."""

    blocks: AbstractBlocks
    recipe: Recipe
    plan: Plan
    state: ModalityState
    inputs: BlockInputs
    device: torch.device
    notes: list[str]
    progress: AbstractProgress
    held_back: Collection[str] = ()
    gradients: TokenGradients | None = None
    sites: dict[str, Site] = field(default_factory=dict)
    float_hidden: HiddenStates | None = None
    spending: Spending | None = None
    learned_rotation: Tensor | None = None
    moment_bytes: int | None = None
    stages: Stages = field(default_factory=Stages)
    originals: dict[str, OriginalGroup] = field(default_factory=dict)

    def __post_init__(self) -> None:
        learned = self.recipe.smoothing.learned
        if learned is not None and learned.target == "float_chain":
            self.float_hidden = self.inputs.hidden.copy()

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return core_of(self.blocks.model).dtype

    def block(self, index: int, store: BlockStore | None) -> dict[str, Any]:
        """Quantize (or take from `store`) one block, and advance the hidden states through it."""
        start = time.monotonic()
        block = self.prepare(index)
        groups = self.plan.blocks[index]
        finished = from_first(store.load(index) if store else None)
        if finished:
            self.advance_float(block, index)
            record = self.restore(block, index, groups, *finished)
            self.advance(block, index)
            restore_dtype(block, self.dtype)
        else:
            noted = len(self.notes)
            record = self.solve(block, index, groups)
            record["seconds"] = time.monotonic() - start
            record["peak_memory"] = peak_memory()
            restore_dtype(block, self.dtype)
            if store:
                tensors = {self.blocks.prefix(index) + name: t for name, t in block.state_dict().items()}
                kept = {"sites": _site_dicts(self.sites, index), "notes": self.notes[noted:]}
                store.save(index, tensors, {**record, **kept})
        self.blocks.finish(block)
        del block
        gc.collect()  # hooks and closures refer to a block in circles: it would stay beside the next ones
        return record

    def rehearse(self, index: int) -> dict[str, float]:
        """Quantize a copy of a block and advance the hidden states through it; its error per modality."""
        error: dict[str, float] = self.solve(self.prepare(index, copy=True), index, self.plan.blocks[index])["error"]
        gc.collect()
        return error

    def prepare(self, index: int, *, copy: bool = False) -> nn.Module:
        """The block (or a copy) on the run's device, in float32 and rotated if the recipe says so."""
        block = (self.blocks.copy(index) if copy else self.blocks.take(index)).to(self.device).float()
        experts = experts_in(block)
        if experts is not None:
            experts.state = self.state
        if self.recipe.rotations is not None:
            config = decoder_of(self.blocks.model).config
            rotations, learned, groups = self.recipe.rotations, self.learned_rotation, self.plan.blocks[index]
            if not copy:
                self.originals = original_groups(
                    block, self.plan.family, groups, rotations, config, learned, self.dtype
                )
            rotate_block(block, self.plan.family, groups, rotations, config, learned)
        return block

    def solve(self, block: nn.Module, index: int, groups: tuple[GroupPlan, ...]) -> dict[str, Any]:
        """Quantize one block; its report."""
        targets = self.inputs.hidden.empty()
        parts = (groups,) if self.recipe.smoothing.learned else self.parts(groups)
        statistics = self.observe(block, index, parts[-1], targets)
        self.advance_float(block, index)
        with self.stages.timed("learn"):
            learned, learning = self.learn(block, index, groups, statistics, targets)

        ranges: dict[str, InputRanges] = {}
        plain: dict[str, Mapping[Modality, float]] = {}

        def take_statistics(group: GroupPlan) -> GroupStatistics:
            name = group.name
            if name not in statistics:
                statistics.update(self.observe(block, index, next(p for p in parts if group in p)))
            found = statistics.pop(name)
            ranges[name], plain[name] = found.ranges(), self.plain_errors(block, group, found)
            return found

        config = decoder_of(self.blocks.model).config
        with self.stages.timed("solve"):
            solutions, folds = solve_block(
                block,
                self.plan.family,
                groups,
                take_statistics,
                self.state,
                self.recipe,
                config,
                learned,
                lambda group: self.modality_weights(index, group),
                lambda group, spent: self.terms(index, group, spent),
                self.dtype,
            )
        with self.stages.timed("refine"):
            final, refining = self.refine(block, index, groups, solutions, folds, targets)
        with self.stages.timed("apply"):
            sites = apply_solutions(block, self.plan.family, groups, final, folds, self.state, self.recipe, self.dtype)
        if self.spending is not None:
            self.spending.left -= sum(added_bytes(s) for s in solutions.values())
        self.sites.update({site_key(index, name): site for name, site in sites.items() if site != Site()})
        return {
            "block": index,
            "groups": [
                group_record(g, solutions[g.name], ranges[g.name], self.state.tokens.modalities, plain[g.name])
                for g in groups
            ],
            "error": self.advance(block, index, targets),
            **routing_record(block, self.state.tokens.modalities),
            **learning,
            **refining,
        }

    def parts(self, groups: tuple[GroupPlan, ...]) -> list[tuple[GroupPlan, ...]]:
        """The groups, in order, in parts of at least one whose second moments fit into `moment_bytes`."""
        if self.moment_bytes is None or not self.recipe.needs_moments:
            return [groups]
        parts: list[tuple[GroupPlan, ...]] = []
        size = 0
        for group in groups:
            more = len(self.state.tokens.modalities) * moment_bytes(group.in_features)
            if not parts or size + more > self.moment_bytes:
                parts.append(())
                size = 0
            parts[-1] = (*parts[-1], group)
            size += more
        return parts or [groups]  # a block that the recipe ignores has none

    def observe(
        self, block: nn.Module, index: int, groups: tuple[GroupPlan, ...], targets: HiddenStates | None = None
    ) -> dict[str, GroupStatistics]:
        """Statistics of groups' inputs while the float block runs on the quantized chain; its outputs go to `targets`.

        Raises:
            ModelError: an input is not finite.
        """
        with self.stages.timed("observe"):
            return self._observe(block, index, groups, targets)

    def _observe(
        self, block: nn.Module, index: int, groups: tuple[GroupPlan, ...], targets: HiddenStates | None
    ) -> dict[str, GroupStatistics]:
        inputs = self.inputs

        def forward(i: int) -> None:
            output = inputs.run(block, index, i, inputs.hidden[i], self.device)
            if targets is not None and len(targets) == i:  # experts' tokens are counted in a pass before
                targets.append(output)

        batches = [
            (b.ids, b.mask, torch.tensor([name in self.held_back for name in b.samples])) for b in inputs.batches
        ]
        leaders = {g.name: g.linears[0].name for g in groups}
        statistics = collect_statistics(
            block,
            leaders,
            batches,
            forward,
            len(self.state.tokens.modalities),
            self.recipe.needs_moments,
            self.token_weights(index),
            {name: original.inputs for name, original in self.originals.items()},
        )
        self.check(index, statistics)
        return statistics

    def plain_errors(
        self, block: nn.Module, group: GroupPlan, statistics: GroupStatistics
    ) -> Mapping[Modality, float]:
        """Per modality, the relative error of rounding the float model's group to nearest."""
        original = self.originals.pop(group.name, None) or OriginalGroup(stacked_weight(block, group))
        bits = self.recipe.scheme.input_activations.num_bits
        return plain_errors(group, original, statistics, self.state.tokens.modalities, bits)

    def token_weights(self, index: int) -> dict[str, list[Tensor]] | None:
        """Weights of the tokens in the block's statistics, per group and batch."""
        if self.gradients is None or self.recipe.rounding.balance != "gradient":
            return None
        args = self.recipe.gradient
        return self.gradients.weights(index, [b.mask for b in self.inputs.batches], args.floor, args.cap)

    def expect_losses(self) -> dict[str, tuple[Option, ...]]:
        """Per site, what each grid would cost and lose, on the float model; nothing is changed."""
        probe = replace(self, inputs=self.inputs.copy(), held_back=(), notes=[], float_hidden=None)
        recipe, assumed = self.recipe, replace(self.recipe.gradient, floor=0.0)
        probe.recipe = replace(recipe, gradient=assumed, rounding=replace(recipe.rounding, balance="gradient"))
        assert self.gradients is not None
        batches, cap = self.inputs.batches, recipe.gradient.cap
        options = {}
        indices = range(len(self.plan.blocks))
        for index in self.progress.track(indices, "expecting losses", len(indices), "block"):
            groups = self.plan.blocks[index]
            block = probe.prepare(index, copy=True)
            outputs = probe.inputs.hidden.empty()
            statistics = probe.observe(block, index, groups, outputs)
            for group in groups:
                moment = statistics[group.name].merged().moment
                assert moment is not None
                weights = recipe.scheme.weights
                options[site_key(index, group.name)] = options_of(
                    group,
                    stacked_weight(block, group),
                    moment.sum(0) * loss_per_error(self.gradients, batches, index, group.name, cap),
                    recipe.rounding.damping,
                    weights.num_bits,
                    weights.full_range,
                )
            for i in range(len(outputs)):
                probe.inputs.hidden[i] = outputs[i]
        return options

    def spend(self) -> None:
        """Give every group its grid within the recipe's budget, if there is one."""
        budget = self.recipe.budget
        if budget is not None:
            patches = self.recipe.compensation is not None
            self.spending = Spending.on_grids(self.plan, self.expect_losses(), budget, patches)
            self.plan = self.spending.plan
            for note in self.spending.notes:
                self.note(note)

    def terms(self, index: int, group: GroupPlan, spent: int) -> tuple[float | None, int]:
        """Price and most bytes of a group's vectors and patches, `spent` bytes after the last block."""
        if self.spending is None:
            return UNLIMITED
        assert self.gradients is not None
        cap = self.recipe.gradient.cap
        loss = loss_per_error(self.gradients, self.inputs.batches, index, group.name, cap)
        return self.spending.terms(spent, loss / group.out_features)

    def note(self, text: str) -> None:
        """Say something in the report and to who watches."""
        self.notes.append(text)
        self.progress.note(text)

    def modality_weights(self, index: int, group: str) -> Mapping[Modality, float]:
        """Importance of each modality's error in a group."""
        if self.recipe.modality_weights != "gradient":
            return self.recipe.modality_weights
        assert self.gradients is not None
        modalities, batches = self.state.tokens.modalities, self.inputs.batches
        ids, masks = [b.ids for b in batches], [b.mask for b in batches]
        means = self.gradients.modality_means(index, group, ids, masks, len(modalities))
        return dict(zip(modalities, means, strict=True))

    def advance_float(self, block: nn.Module, index: int) -> None:
        """Run the float chain, if the recipe needs it, through the block while it is still in floating point."""
        for i in range(len(self.inputs.batches) if self.float_hidden is not None else 0):
            assert self.float_hidden is not None
            self.float_hidden[i] = self.inputs.run(block, index, i, self.float_hidden[i], self.device)

    def check(self, index: int, statistics: Mapping[str, GroupStatistics]) -> None:
        """Refuse activations that are not finite."""
        for name, found in statistics.items():
            if not all(bool(part.absmax.isfinite().all()) for part in (found.fitting, found.deciding)):
                raise ModelError(
                    f"layers.{index}: the input of {name} holds NaN or infinity on the calibration samples; load the "
                    "model in bfloat16 or float32, and check its weights"
                )

    def learn(
        self,
        block: nn.Module,
        index: int,
        groups: tuple[GroupPlan, ...],
        statistics: Mapping[str, GroupStatistics],
        targets: HiddenStates,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Vectors learned on the block's output, and what to report of it; nothing if the recipe has none."""
        args = self.recipe.smoothing.learned
        if args is None:
            return {}, {}
        roles, rotations = self.recipe.smoothing.groups, self.recipe.rotations
        smoothed = [g for g in groups if g.role in roles and folds_text(g, rotations)]
        initial = {}
        for group in smoothed:
            merged = statistics[group.name].merged()
            weight_absmax = stacked_weight(block, group).abs().amax(0)
            vectors = smooth_scale(merged.absmax, weight_absmax, self.recipe.smoothing.strength)
            absent = (merged.counts == 0)[:, None]
            initial[group.name] = torch.where(absent, vectors[0], vectors)
        bits = self.recipe.scheme.weights.num_bits, self.recipe.scheme.input_activations.num_bits

        def trials(theta: Mapping[str, Tensor], ids: Any) -> dict[str, nn.Module]:
            return {
                p.name: TrialLinear(
                    linear_of(block, p.name),
                    theta.get(g.name),
                    (bits[0], p.group_size, bits[1]),
                    seen_ids(ids, token_rows(block, p.name)),
                )
                for g in groups
                for p in g.linears
            }

        hidden, float_hidden = self.inputs.hidden, self.float_hidden
        wanted = targets if float_hidden is None else float_hidden
        result = learn_vectors(
            block,
            initial,
            trials,
            lambda i: self.inputs.run(block, index, i, hidden[i], self.device),
            wanted,
            [(b.ids.to(self.device), b.mask.to(self.device)) for b in self.inputs.batches],
            [self.modality_weights(index, groups[-1].name)[m] for m in self.state.tokens.modalities],
            args,
            self.recipe.seed + index,
        )
        if result.loss_after >= result.loss_before:
            self.note(f"layers.{index}: learned smoothing did not lower the loss; the closed form is kept")
        return dict(result.vectors), {
            "learned": {"before": result.loss_before, "after": result.loss_after, "steps": result.steps}
        }

    def refine(
        self,
        block: nn.Module,
        index: int,
        groups: tuple[GroupPlan, ...],
        solutions: Mapping[str, GroupSolution],
        folds: Mapping[str, Tensor],
        targets: HiddenStates,
    ) -> tuple[Mapping[str, GroupSolution], dict[str, Any]]:
        """Solutions refined on the block's output, and what to report of it; unchanged if the recipe has none."""
        args = self.recipe.refinement
        if args is None:
            return solutions, {}
        start = time.monotonic()
        modalities = self.state.tokens.modalities
        result = refine_block(
            block,
            groups,
            solutions,
            {group.name: stacked_fold(group, folds, self.device) for group in groups},
            lambda i: self.inputs.run(block, index, i, self.inputs.hidden[i], self.device),
            targets,
            self.split_masks(),
            modalities,
            [self.modality_weights(index, groups[-1].name)[m] for m in modalities],
            self.recipe.scheme.input_activations.num_bits,
            self.recipe.scheme.weights.full_range,
            args,
            self.recipe.seed + index,
        )
        record = {"before": result.loss_before, "after": result.loss_after, "seconds": time.monotonic() - start}
        return result.solutions, {"refined": record}

    def split_masks(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per batch: modality ids, tokens to fit to, tokens that decide; the same where no sample is held back."""
        split = []
        for b in self.inputs.batches:
            held = torch.tensor([name in self.held_back for name in b.samples])[:, None]
            fit, decide = (b.mask & ~held, b.mask & held) if self.held_back else (b.mask, b.mask)
            split.append((b.ids.to(self.device), fit.to(self.device), decide.to(self.device)))
        return split

    def advance(self, block: nn.Module, index: int, targets: HiddenStates | None = None) -> dict[str, float]:
        """Run the quantized block and make its outputs the next inputs.

        Returns:
            Per modality, the relative squared error of the outputs, if `targets` are given.
        """
        with self.stages.timed("advance"):
            return self._advance(block, index, targets)

    def _advance(self, block: nn.Module, index: int, targets: HiddenStates | None) -> dict[str, float]:
        modalities = self.state.tokens.modalities
        error = torch.zeros(len(modalities), 2, dtype=torch.float64)
        for i, batch in enumerate(self.inputs.batches):
            self.state.set(batch.ids.to(self.device))
            try:
                output = self.inputs.run(block, index, i, self.inputs.hidden[i], self.device).cpu()
            finally:
                self.state.set(None)
            self.inputs.hidden[i] = output
            if targets is not None:
                target = targets[i]
                difference = (output - target).square().sum(-1, dtype=torch.float64)
                energy = target.square().sum(-1, dtype=torch.float64)
                for m in range(len(modalities)):
                    chosen = (batch.ids == m) & batch.mask
                    error[m] += torch.stack((difference[chosen].sum(), energy[chosen].sum()))
        sum_over_processes(error)
        return {m.value: float(e / n) for m, (e, n) in zip(modalities, error, strict=True) if n}

    def restore(
        self,
        block: nn.Module,
        index: int,
        groups: tuple[GroupPlan, ...],
        tensors: Mapping[str, Tensor],
        record: dict[str, Any],
    ) -> dict[str, Any]:
        """Put a finished block in place."""
        self.notes += record.pop("notes")
        modalities = self.state.tokens.modalities
        sites = {name: parse_site(name, entry, modalities) for name, entry in record.pop("sites").items()}
        for group in groups:
            site = sites.get(group.name, Site())
            if group.name in sites:
                self.sites[site_key(index, group.name)] = site
            replace_group(
                block,
                group,
                activation_bits=self.recipe.scheme.input_activations.num_bits,
                has_smooth_scale=site.has_smooth_scale,
                ranks=site.ranks,
                factors=site.factors,
                rotation=group_rotation(group, self.recipe.rotations),
                state=self.state,
                dtype=self.dtype,
                device=self.device,
            )
        block.load_state_dict(dict(tensors))
        if self.spending is not None:
            added = (g["bytes"]["smooth_scale"] + g["bytes"]["compensation"] for g in record["groups"])
            self.spending.left -= sum(added)
        return record


def routing_record(block: nn.Module, modalities: Sequence[Modality]) -> dict[str, Any]:
    """How many calibration tokens of each modality the block's experts got, and which of them had so few that they
    were fitted to the tokens of all experts; nothing for a block without experts."""
    experts = experts_in(block)
    if experts is None or experts.counts is None or experts.few is None:
        return {}
    counts, shared = experts.counts, experts.few & (experts.counts.sum(0) > 0)
    return {
        "experts": {
            "tokens": {m.value: counts[:, row].tolist() for row, m in enumerate(modalities)},
            "fitted_to_all_tokens": {
                m.value: shared[:, row].nonzero().flatten().tolist() for row, m in enumerate(modalities)
            },
        }
    }


def _site_dicts(sites: Mapping[str, Site], index: int) -> dict[str, Any]:
    """Sites of one block as JSON, by group name."""
    prefix = f"{index}."
    return {key.removeprefix(prefix): site.to_dict() for key, site in sites.items() if key.startswith(prefix)}

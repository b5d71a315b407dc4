"""The set criterion as a whole: normalisation, padding, empty batches, options."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from double_precision import CLOSE, float64
from hypothesis import given, settings
from hypothesis import strategies as st

from instructsam.losses.boxes import cxcywh_to_xyxy
from instructsam.losses.criterion import CriterionConfig, SetCriterion, count_targets
from instructsam.losses.mask_losses import PointSampling, projection_loss
from instructsam.losses.matching import match

EVERYTHING = CriterionConfig(box_l1=5.0, box_giou=2.0, aux=0.5)


def make_outputs(seed=0, phrases=4, queries=5, size=8, aux=2, presence=True):
    generator = torch.Generator().manual_seed(seed)

    def layer(earlier):
        corners = torch.rand(phrases, queries, 4, generator=generator) * 0.5 + 0.1
        return SimpleNamespace(
            pred_masks=(torch.randn(phrases, queries, size, size, generator=generator) * 2).requires_grad_(),
            pred_logits=torch.randn(phrases, queries, generator=generator).requires_grad_(),
            pred_boxes=cxcywh_to_xyxy(corners).requires_grad_(),
            presence_logits=torch.randn(phrases, 1, generator=generator).requires_grad_() if presence else None,
            aux=earlier,
        )

    return layer([layer(None) for _ in range(aux)])


def make_targets(counts=(2, 0, 3, 1), truths=3, size=8, seed=0, box_only=()):
    generator = torch.Generator().manual_seed(seed + 1)
    phrases = len(counts)
    valid = torch.arange(truths)[None] < torch.tensor(counts, dtype=torch.long).reshape(-1, 1)
    masks = (torch.rand(phrases, truths, size, size, generator=generator) > 0.5) & valid[..., None, None]
    return {
        "target_masks": masks,
        "target_valid": valid,
        "target_box_only": torch.tensor([p in box_only for p in range(phrases)], dtype=torch.bool),
        "target_boxes": torch.rand(phrases, truths, 4, generator=generator) * 0.5 + 0.1,
    }


def leaves(outputs):
    found = [outputs.pred_masks, outputs.pred_logits, outputs.pred_boxes]
    found += [] if outputs.presence_logits is None else [outputs.presence_logits]
    return found + [leaf for layer in outputs.aux or [] for leaf in leaves(layer)]


def pick(outputs, index):
    """The outputs of some phrases, connected to the whole."""
    return SimpleNamespace(
        pred_masks=outputs.pred_masks[index],
        pred_logits=outputs.pred_logits[index],
        pred_boxes=outputs.pred_boxes[index],
        presence_logits=None if outputs.presence_logits is None else outputs.presence_logits[index],
        aux=None if outputs.aux is None else [pick(layer, index) for layer in outputs.aux],
    )


def gradients(terms, outputs):
    return torch.autograd.grad(sum(terms.values()), leaves(outputs))


@float64()
def test_terms_equal_a_naive_loop_over_pairs():
    outputs, targets = make_outputs(), make_targets()
    terms = SetCriterion()(outputs, targets, count_targets(targets))
    matches = match(outputs.pred_masks, outputs.pred_logits, targets["target_masks"], targets["target_valid"])
    bce = dice = 0.0
    soft = torch.zeros(4, 5)
    for p, n, g in zip(*(index.tolist() for index in matches), strict=True):
        logit, truth = outputs.pred_masks[p, n], targets["target_masks"][p, g].float()
        prob = logit.sigmoid()
        bce += F.binary_cross_entropy_with_logits(logit, truth)
        dice += 1 - (2 * (prob * truth).sum() + 1) / (prob.sum() + truth.sum() + 1)
        soft[p, n] = max((2 * (prob * truth).sum() + 1e-6).item() / (prob.sum() + truth.sum() + 1e-6).item(), 0.1)
    torch.testing.assert_close(terms["mask_bce"], 4.0 * bce / 6)
    torch.testing.assert_close(terms["mask_dice"], 0.25 * dice / 6)
    torch.testing.assert_close(terms["cls"], F.binary_cross_entropy_with_logits(outputs.pred_logits, soft))
    assert (soft[1] == 0).all()


def test_release_terms_and_their_names():
    targets = make_targets()
    del targets["target_box_only"], targets["target_boxes"]
    terms = SetCriterion()(make_outputs(aux=0, presence=False), targets, count_targets(targets))
    assert set(terms) == {"mask_bce", "mask_dice", "cls"}
    assert all(term.dtype == torch.float32 and term.shape == () for term in terms.values())


def test_class_target_of_a_matched_query_has_a_floor():
    """A query matched to a mask that it misses wholly still learns that it is wanted."""
    outputs, targets = make_outputs(phrases=1, queries=1, aux=0, presence=False), make_targets((1,))
    with torch.no_grad():
        outputs.pred_masks.fill_(-20.0)
    logit = outputs.pred_logits[0, 0]
    for floor in (0.1, 0.4):
        terms = SetCriterion(CriterionConfig(min_soft_target=floor))(outputs, targets, count_targets(targets))
        expected = F.binary_cross_entropy_with_logits(logit, torch.tensor(floor))
        assert terms["cls"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_gradient_through_the_class_targets():
    """The class loss alone must not move the masks."""
    outputs, targets = make_outputs(), make_targets()
    terms = SetCriterion()(outputs, targets, count_targets(targets))
    (grad,) = torch.autograd.grad(terms["cls"], outputs.pred_masks, allow_unused=True)
    assert grad is None or not grad.any()


@float64()
@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    counts=st.lists(st.integers(0, 3), min_size=2, max_size=6),
    cut=st.integers(0, 6),
)
def test_parts_with_global_counts_add_up_to_the_whole(seed, counts, cut):
    cut = min(cut, len(counts))  # a part may be empty
    outputs, targets = make_outputs(seed, len(counts)), make_targets(counts, seed=seed, box_only=(0,))
    criterion = SetCriterion(EVERYTHING)
    whole_counts = count_targets(targets)
    whole = criterion(outputs, targets, whole_counts)
    whole_grads = gradients(whole, outputs)

    total = [torch.zeros_like(leaf) for leaf in leaves(outputs)]
    sums: dict[str, torch.Tensor] = {}
    part_counts = []
    for part in (slice(0, cut), slice(cut, None)):
        part_targets = {name: value[part] for name, value in targets.items()}
        part_counts.append(count_targets(part_targets))
        terms = criterion(pick(outputs, part), part_targets, whole_counts)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value
        total = [a + b for a, b in zip(total, gradients(terms, outputs), strict=True)]
    assert set(sums) == set(whole)
    for name in whole:
        torch.testing.assert_close(sums[name], whole[name], rtol=CLOSE, atol=CLOSE)
        if name in whole_counts:
            assert part_counts[0][name] + part_counts[1][name] == whole_counts[name]
    for mine, expected in zip(total, whole_grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=CLOSE, atol=CLOSE)


@float64()
def test_padding_with_invalid_targets_changes_nothing():
    outputs, targets = make_outputs(), make_targets()
    criterion = SetCriterion(EVERYTHING)
    plain = criterion(outputs, targets, count_targets(targets))
    padded = {
        "target_masks": F.pad(targets["target_masks"], (0, 0, 0, 0, 0, 9), value=True),
        "target_valid": F.pad(targets["target_valid"], (0, 9), value=False),
        "target_boxes": F.pad(targets["target_boxes"], (0, 0, 0, 9), value=float("nan")),
        "target_box_only": targets["target_box_only"],
    }
    again = criterion(outputs, padded, count_targets(padded))
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value)
    for mine, expected in zip(gradients(again, outputs), gradients(plain, outputs), strict=True):
        torch.testing.assert_close(mine, expected)


@float64()
def test_order_of_queries_and_targets_is_irrelevant():
    outputs, targets = make_outputs(aux=0), make_targets()
    criterion = SetCriterion()
    plain = criterion(outputs, targets, count_targets(targets))
    queries, truths = [3, 1, 4, 0, 2], [2, 0, 1]
    moved = SimpleNamespace(
        pred_masks=outputs.pred_masks[:, queries],
        pred_logits=outputs.pred_logits[:, queries],
        pred_boxes=outputs.pred_boxes[:, queries],
    )
    shuffled = {name: value[:, truths] for name, value in targets.items() if name != "target_box_only"}
    again = criterion(moved, shuffled, count_targets(shuffled))
    for name, value in again.items():
        torch.testing.assert_close(value, plain[name])


@pytest.mark.parametrize("config", [CriterionConfig(), EVERYTHING, CriterionConfig(points=PointSampling(30))])
@pytest.mark.parametrize(("counts", "truths"), [((), 3), ((), 0), ((0, 0), 0), ((0, 0), 3)])
def test_batches_without_masks_reach_every_output(config, counts, truths):
    """No phrase: all terms and gradients are zero but exist. No mask: only scores are trained."""
    outputs, targets = make_outputs(phrases=len(counts)), make_targets(counts, truths)
    terms = SetCriterion(config)(outputs, targets, count_targets(targets))
    grads = torch.autograd.grad(sum(terms.values()), leaves(outputs))  # raises for an unconnected output
    for leaf, grad in zip(leaves(outputs), grads, strict=True):
        assert grad.isfinite().all()
        if leaf.dim() == 4 or leaf.shape[-1] == 4:
            assert not grad.any()
    for name, value in terms.items():
        if not counts or "cls" not in name and "presence" not in name:
            assert value.item() == 0, name
    if counts:
        assert terms["cls"].item() == pytest.approx(F.softplus(outputs.pred_logits).mean().item())


def test_batches_without_phrases_reach_the_parameters_behind_the_outputs():
    weight = torch.randn(6, requires_grad=True)
    outputs, targets = make_outputs(phrases=0, aux=0, presence=False), make_targets(())
    outputs.pred_masks = torch.zeros(0, 5, 8, 8) * weight.sum()
    outputs.pred_logits, outputs.pred_boxes = torch.zeros(0, 5) * weight[0], torch.zeros(0, 5, 4) * weight[1]
    sum(SetCriterion()(outputs, targets, count_targets(targets)).values()).backward()
    assert torch.equal(weight.grad, torch.zeros(6))


def test_unused_boxes_stay_in_the_graph_without_effect():
    outputs, targets = make_outputs(presence=False), make_targets()
    with torch.no_grad():
        outputs.pred_boxes[0, 0, 0] = float("nan")
    terms = SetCriterion()(outputs, targets, count_targets(targets))
    total = sum(terms.values())
    assert total.isfinite()
    for grad in torch.autograd.grad(total, [outputs.pred_boxes, *leaves(outputs.aux[0])]):
        assert not grad.any()


@float64()
def test_box_only_phrases():
    outputs, targets = make_outputs(aux=0), make_targets(box_only=(0, 2, 3))
    terms = SetCriterion()(outputs, targets, count_targets(targets))
    assert terms["mask_bce"].item() == 0 and terms["mask_dice"].item() == 0  # phrase 1 is no-target
    p, n, g = match(outputs.pred_masks, outputs.pred_logits, targets["target_masks"], targets["target_valid"])
    expected = 0.5 * projection_loss(outputs.pred_masks[p, n], targets["target_masks"][p, g]).mean()
    torch.testing.assert_close(terms["mask_projection"], expected)

    mixed = make_targets(box_only=(2,))
    some = SetCriterion()(outputs, mixed, count_targets(mixed))
    assert some["mask_bce"].item() > 0 and 0 < some["mask_projection"].item() < terms["mask_projection"].item()


def test_box_losses():
    targets = make_targets()
    outputs = make_outputs(aux=0)
    config = CriterionConfig(box_l1=5.0, box_giou=2.0)
    terms = SetCriterion(config)(outputs, targets, count_targets(targets))
    p, n, g = match(outputs.pred_masks, outputs.pred_logits, targets["target_masks"], targets["target_valid"])
    assert terms["box_l1"].item() > 0 and terms["box_giou"].item() > 0
    with torch.no_grad():
        outputs.pred_boxes[p, n] = cxcywh_to_xyxy(targets["target_boxes"][p, g])
    perfect = SetCriterion(config)(outputs, targets, count_targets(targets))
    assert perfect["box_l1"].item() == pytest.approx(0, abs=1e-5)
    assert perfect["box_giou"].item() == pytest.approx(0, abs=1e-5)


@float64()
def test_auxiliary_layers_are_matched_anew_and_weighted():
    outputs, targets = make_outputs(), make_targets()
    counts = count_targets(targets)
    terms = SetCriterion(CriterionConfig(aux=0.5))(outputs, targets, counts)
    alone = [SetCriterion()(SimpleNamespace(**{**vars(layer), "aux": None}), targets, counts) for layer in outputs.aux]
    for name in alone[0]:
        torch.testing.assert_close(terms[f"aux_{name}"], 0.5 * (alone[0][name] + alone[1][name]))
    plain = SetCriterion()(outputs, targets, counts)
    assert not any(name.startswith("aux_") for name in plain)
    torch.testing.assert_close(terms["cls"], plain["cls"])


@float64()
def test_cost_bias_decides_the_matching_of_every_layer_and_adds_no_loss():
    outputs, targets = make_outputs(), make_targets((1, 1, 1, 1))
    counts = count_targets(targets)
    bias = torch.full((4, 5, 3), 1e3)
    bias[:, 2] = 0
    terms = SetCriterion(CriterionConfig(aux=1.0))(outputs, targets, counts, cost_bias=bias)
    truth = targets["target_masks"][:, 0].float()
    for name, layers in (("mask_bce", [outputs]), ("aux_mask_bce", outputs.aux)):
        expected = sum(F.binary_cross_entropy_with_logits(layer.pred_masks[:, 2], truth) for layer in layers)
        torch.testing.assert_close(terms[name], 4.0 * expected)
    none = SetCriterion()(outputs, targets, counts, cost_bias=torch.zeros_like(bias))
    torch.testing.assert_close(none["mask_bce"], SetCriterion()(outputs, targets, counts)["mask_bce"])


@float64()
def test_presence_loss_where_the_model_has_the_token():
    outputs, targets = make_outputs(aux=0), make_targets()
    counts = count_targets(targets)
    terms = SetCriterion(CriterionConfig(presence=2.0))(outputs, targets, counts)
    truth = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    torch.testing.assert_close(
        terms["presence"], 2 * F.binary_cross_entropy_with_logits(outputs.presence_logits, truth)
    )
    assert "presence" not in SetCriterion(CriterionConfig(presence=0))(outputs, targets, counts)


def test_point_sampling_is_deterministic_and_leaves_matching_and_scores_alone():
    outputs, targets = make_outputs(aux=0, size=24), make_targets(size=24)
    counts = count_targets(targets)
    sampled = SetCriterion(CriterionConfig(points=PointSampling(100)))
    first, again, other = (sampled(outputs, targets, counts, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    full = SetCriterion()(outputs, targets, counts)
    assert first["mask_bce"] == again["mask_bce"] != other["mask_bce"]
    assert first["mask_bce"] != full["mask_bce"]
    torch.testing.assert_close(first["cls"], full["cls"])


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_outputs_equal_their_float32_values(autocast):
    outputs, targets = make_outputs(), make_targets()
    coarse = pick(outputs, slice(None))
    for layer in [coarse, *coarse.aux]:
        for name in ("pred_masks", "pred_logits", "pred_boxes", "presence_logits"):
            setattr(layer, name, getattr(layer, name).bfloat16())
    fine = pick(coarse, slice(None))
    for layer in [fine, *fine.aux]:
        for name in ("pred_masks", "pred_logits", "pred_boxes", "presence_logits"):
            setattr(layer, name, getattr(layer, name).float())
    counts = count_targets(targets)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        terms = SetCriterion(EVERYTHING)(coarse, targets, counts)
    expected = SetCriterion(EVERYTHING)(fine, targets, counts)
    for name, value in expected.items():
        assert terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name], value)
    assert all(grad.isfinite().all() for grad in gradients(terms, outputs))


def test_saturated_bf16_logits_keep_loss_and_gradient_finite():
    outputs, targets = make_outputs(aux=0), make_targets(box_only=(2,))
    with torch.no_grad():
        outputs.pred_masks.mul_(1e4)
        outputs.pred_logits.mul_(1e4)
    half = pick(outputs, slice(None))
    half.pred_masks, half.pred_logits = half.pred_masks.bfloat16(), half.pred_logits.bfloat16()
    terms = SetCriterion(CriterionConfig(box_l1=1.0, box_giou=1.0))(half, targets, count_targets(targets))
    assert sum(terms.values()).isfinite()
    assert all(grad.isfinite().all() for grad in gradients(terms, outputs))


def test_non_finite_predictions_name_the_phrase():
    outputs, targets = make_outputs(), make_targets()
    with torch.no_grad():
        outputs.pred_masks[2, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="phrase 2"):
        SetCriterion()(outputs, targets, count_targets(targets))


def test_counts_of_a_batch():
    counts = count_targets(make_targets((2, 0, 3, 1)))
    assert counts["pairs"].item() == 6 and counts["phrases"].item() == 4
    assert all(count.dtype == torch.float32 for count in counts.values())
    empty = count_targets(make_targets(()))
    assert empty["pairs"].item() == 0 and empty["phrases"].item() == 0


def test_wrong_shapes_are_named():
    outputs, targets = make_outputs(), make_targets(size=16)
    with pytest.raises(ValueError, match="target_masks has shape"):
        SetCriterion()(outputs, targets, count_targets(targets))
    targets = make_targets()
    targets["target_valid"] = targets["target_valid"][:, :1]
    with pytest.raises(ValueError, match="target_masks has shape"):
        SetCriterion()(outputs, targets, count_targets(targets))


def test_missing_boxes_and_missing_layers_are_errors():
    outputs, targets = make_outputs(), make_targets()
    counts = count_targets(targets)
    del targets["target_boxes"]
    with pytest.raises(ValueError, match="target_boxes"):
        SetCriterion(CriterionConfig(box_l1=1.0))(outputs, targets, counts)
    outputs.aux = None
    with pytest.raises(ValueError, match="earlier decoder layers"):
        SetCriterion(CriterionConfig(aux=1.0))(outputs, targets, counts)


@pytest.mark.parametrize(
    "wrong", [{"cls": -1.0}, {"mask_bce": float("nan")}, {"aux": float("inf")}, {"min_soft_target": 2.0}, {"points": 5}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CriterionConfig(**wrong)


def test_settings_from_a_mapping():
    config = CriterionConfig.from_mapping({"aux": 1.0, "points": {"num_points": 12_544}})
    assert config == CriterionConfig(aux=1.0, points=PointSampling(num_points=12_544))
    assert CriterionConfig.from_mapping({}) == CriterionConfig()
    with pytest.raises(ValueError, match="criterion: unknown mask_weight"):
        CriterionConfig.from_mapping({"mask_weight": 1.0})
    with pytest.raises(ValueError, match="criterion.points: unknown count"):
        CriterionConfig.from_mapping({"points": {"count": 1}})


def test_a_floor_of_one_makes_hard_class_targets():
    outputs, targets = make_outputs(phrases=1, queries=1, aux=0, presence=False), make_targets((1,))
    terms = SetCriterion(CriterionConfig(min_soft_target=1))(outputs, targets, count_targets(targets))
    assert terms["cls"].item() == pytest.approx(F.softplus(-outputs.pred_logits[0, 0]).item(), rel=1e-6)

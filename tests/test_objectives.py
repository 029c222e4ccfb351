"Objectives on random batches: against plain loops over queries, against finite differences, and in parts."

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from w2r2.method.alignment import Targets, adapted_cross_entropy, align, query_losses, similarity
from w2r2.method.interventions import displace
from w2r2.method.objectives import READINGS, deter, push, shortcut_pass
from w2r2.model.backbone import build_tokenizer
from w2r2.model.examples import tiny_model
from w2r2.model.fused import INPUTS
from w2r2.model.packing import Packer
from w2r2.scans.geometry import box_iou, box_iou_soft
from w2r2.tasks.answers import Bins

BINS = Bins(count=40, width=(0.22, 0.22, 0.09, 0.06, 0.06, 0.06))
WORDS = "red blue green chair table lamp near far".split()
TOKENIZER = build_tokenizer(WORDS, BINS)
PACKER = Packer.of(TOKENIZER, BINS)


def make(seed, scenes=3, kinds=None):
    "A batch of random scenes with 0 to 5 queries each of random kinds, some without an answer; `kinds` fixes them."
    rng = np.random.default_rng(seed)
    packed, boxes = [], []
    for _ in range(scenes):
        kind = rng.integers(4, size=rng.integers(6)) if kinds is None else np.array(kinds)
        yaw = rng.uniform(0, 2 * np.pi, 6)
        poses = torch.zeros(6, 4, 4, dtype=torch.float64)
        poses[:, 0, 0], poses[:, 1, 0], poses[:, 0, 2], poses[:, 1, 2] = torch.as_tensor(
            np.stack([np.sin(yaw), -np.cos(yaw), np.cos(yaw), np.sin(yaw)])
        )
        poses[:, 2, 1], poses[:, 3, 3], poses[:, :3, 3] = -1, 1, torch.tensor([0.3, -0.2, 1.5])
        box = torch.as_tensor(
            np.concatenate([rng.uniform(-2, 2, (len(kind), 3)) + [0, 0, 1], rng.uniform(0.3, 2, (len(kind), 3))], 1)
        )
        said = (
            BINS.encode(torch.as_tensor(rng.integers(6, size=len(kind))), box, poses)[0] + PACKER.first_bin
        ).tolist()

        def words():
            return TOKENIZER(" ".join(rng.choice(WORDS, rng.integers(1, 6))))["input_ids"]

        answers = [[token for token in said[n]] if k == 0 else words() if k < 3 else None for n, k in enumerate(kind)]
        packed.append(
            {
                "f2d": torch.as_tensor(rng.normal(size=(288, 64))).float(),
                "geometry": torch.as_tensor(rng.normal(size=(288, 16))).float(),
                "poses": poses,
                "visual_index": torch.arange(0, 288, 36),
                "queries": [(words(), answer) for answer in answers],
            }
        )
        boxes.append(box.float())
    padded = torch.full((scenes, max(map(len, boxes)), 6), torch.nan)
    for row, box in zip(padded, boxes):
        row[: len(box)] = box
    return {**PACKER(packed), "boxes": padded}


def random_logits(targets, seed):
    return 2 * torch.randn(len(targets.labels), len(TOKENIZER), generator=torch.Generator().manual_seed(seed))


def by_loops(batch, fused, short, mu, sigma, weight):
    "Alignment losses, similarities and penalties of each query, one token after the other."
    found, position = {}, 0
    for scene in range(len(batch["labels"])):
        for place in (batch["labels"][scene] >= 0).nonzero()[:, 0].tolist():
            found.setdefault((scene, int(batch["segment"][scene, place])), []).append(
                (position, int(batch["labels"][scene, place]))
            )
            position += 1

    def loss(z, tokens):
        total = 0.0
        for row, label in tokens:
            logp, slot = z[row].log_softmax(-1), int(PACKER.slots(torch.tensor(label)))
            if slot < 1:
                total -= logp[label]
            else:
                first = PACKER.first_bin + BINS.views + (slot - 1) * BINS.count
                near = torch.exp(-0.5 * ((torch.arange(BINS.count) - (label - first)) / sigma) ** 2)
                total -= weight * (near / near.sum() * logp[first : first + BINS.count]).sum()
        return total / len(tokens)

    def coordinate_rows(z, tokens):
        return torch.stack(
            [
                z[row, PACKER.first_bin + BINS.views + n * BINS.count :][: BINS.count]
                for n, (row, _) in enumerate(tokens[1:7])
            ]
        )

    def answer(z, scene, tokens):
        "Similarity soft and greedy, log-probability of the greedy answer, expected box."
        if len(tokens) == 8:
            q, view, poses = (
                coordinate_rows(z, tokens),
                torch.tensor(tokens[0][1] - PACKER.first_bin),
                batch["poses"][scene],
            )
            truth = batch["boxes"][scene, query]
            box = BINS.expect(view, q.softmax(-1), poses)
            best = BINS.decode(torch.cat([view[None], q.argmax(-1) + BINS.views + BINS.count * torch.arange(6)]), poses)
            return box_iou_soft(box, truth), box_iou(best.float(), truth), q.log_softmax(-1).amax(-1).mean(), box
        tokens = tokens[:-1]  # without the end of the answer
        logp = torch.stack([z[row].log_softmax(-1)[label] for row, label in tokens])
        right = [float(z[row].argmax() == label) for row, label in tokens]
        return (
            logp.mean().exp(),
            torch.tensor(sum(right) / len(right)),
            torch.stack([z[row].log_softmax(-1).max() for row, _ in tokens]).mean(),
            None,
        )

    out = {}
    for (scene, query), tokens in found.items():
        s, hard, likely, box = answer(short, scene, tokens)
        followed = box_iou_soft(batch["moved_boxes"][scene, query], batch["boxes"][scene, query])
        align_loss = loss(fused, tokens)
        if box is not None:
            agreed = box_iou_soft(answer(fused, scene, tokens)[3], box)
            z = coordinate_rows(short, tokens).log_softmax(-1)
            missed, said = 1 - answer(fused, scene, tokens)[0], coordinate_rows(fused, tokens).log_softmax(-1)
            apart = (said.exp() * (said - z)).sum(-1).clamp(max=1.0)
            away = (-0.1 * (said.exp() * said).sum(-1) - apart).mean()
            flat = (1 / BINS.count * (-np.log(BINS.count) - z)).sum(-1).mean() / np.log(BINS.count)
        else:
            agreed = sum(
                fused[row].softmax(-1)[short[row].argmax()]
                for row, label in tokens[:-1]
                if short[row].argmax() != label
            ) / len(tokens[:-1])
            flat = missed = away = 0.0
        what = [(row, label) for row, label in tokens if PACKER.slots(torch.tensor(label)) < 1]
        out[scene, query] = {
            "alignment": align_loss,
            "similarity": s,
            "greedy": hard,
            "none": 0.0,
            "literal": max(0, s - mu),
            "direct": max(0, s - mu),
            "features": max(0, s - mu),
            "score": max(0, hard - mu) * likely,
            "agreement": (1 - s) * max(0, agreed - mu),
            "reweight": (1 - max(0, s - mu) / (1 - mu)) * align_loss,
            "poe": loss(fused.log_softmax(-1) + short.log_softmax(-1), tokens),
            "whatwhere": loss(short, what) + flat,
            "counterfactual": max(0, s - max(mu, followed)) if box is not None else 0.0,
            "reward": missed,
            "weighted reward": (1 - max(0, s - mu) / (1 - mu)) * missed,
            "divergence": away,
            "guide": loss(short, tokens) + loss(fused.log_softmax(-1) + short.log_softmax(-1), tokens),
        }
    return out


@pytest.mark.parametrize("seed", range(6))
def test_equal_to_loops(seed):
    batch, mu, sigma, weight = make(seed), 0.05, 0.5 + seed / 2, 0.3
    batch["moved_boxes"] = batch["boxes"] + torch.tensor([0.4, 0, 0, 0, 0, 0])
    targets = Targets(batch, BINS, PACKER.first_bin, sigma, weight)
    fused, short = random_logits(targets, seed), random_logits(targets, 100 + seed)
    short[torch.arange(len(short)), targets.labels] += 6.0 * torch.rand(
        len(short), generator=torch.Generator().manual_seed(seed)
    )  # some answers are good
    expected = by_loops(batch, fused, short, mu, sigma, weight)
    assert set(expected) == set(map(tuple, targets.valid.nonzero().tolist()))
    computed = {
        "alignment": query_losses(adapted_cross_entropy(fused, targets), targets),
        "similarity": similarity(short, targets),
        "greedy": similarity(short, targets, greedy=True),
    }
    for name, values in computed.items():
        for key, value in expected.items():
            assert values[key].item() == pytest.approx(float(value[name]), abs=2e-5), (name, key)
        assert (values[~targets.valid] == 0).all()
    for name in set(READINGS) - {
        "anchored counterfactual"
    }:  # which compares with where a displaced batch has its boxes
        pushed = push(name, fused, short, targets, mu)
        assert pushed.loss.item() == pytest.approx(
            np.mean([float(value[name]) for value in expected.values()]), abs=2e-5
        ), name
    assert align(fused, targets).loss.item() == pytest.approx(
        np.mean([float(value["alignment"]) for value in expected.values()]), abs=2e-5
    )


def test_no_answers():
    batch = make(0, kinds=[3, 3])
    batch["moved_boxes"] = batch["boxes"]
    targets = Targets(batch, BINS, PACKER.first_bin)
    nothing = torch.zeros(0, len(TOKENIZER), requires_grad=True)
    for name in READINGS:
        total = align(nothing, targets).loss + push(name, nothing, nothing, targets).loss
        assert total.item() == 0
        total.backward()


@pytest.mark.parametrize("reading", [name for name, spec in READINGS.items() if spec.penalty])
def test_gradient_is_finite_and_where_it_should_be(reading):
    batch = make(1, kinds=[0, 1, 2])
    targets = Targets(batch | {"moved_boxes": batch["boxes"]}, BINS, PACKER.first_bin)
    for scale in (0.0, 1.0, 1000.0):  # undecided, usual, and so certain that probabilities are 0 and 1
        fused, short = (((scale * random_logits(targets, seed)).requires_grad_()) for seed in (0, 1))
        pushed = push(reading, fused, short, targets, 0.0)
        gradients = (
            torch.autograd.grad(pushed.loss, (fused, short), allow_unused=True)
            if pushed.loss.requires_grad
            else (None, None)
        )
        assert pushed.loss.isfinite() and all(value.isfinite() for value in pushed.logs.values())
        assert (gradients[1] is not None) == READINGS[reading].gradient and (gradients[0] is not None) == (
            reading
            in (
                *("agreement", "reweight", "poe", "guide", "reward", "weighted reward", "divergence"),
                "anchored counterfactual",
            )
        )
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_gradient_of_direct_is_that_of_the_hinge():
    targets = Targets(make(2, kinds=[0, 1, 2]), BINS, PACKER.first_bin)
    short, way = random_logits(targets, 2), random_logits(targets, 3)
    short[torch.arange(len(short)), targets.labels] += 8.0
    short.requires_grad_()
    slope = (torch.autograd.grad(push("direct", short, short, targets, 0.2).loss, short)[0] * way).sum().item()
    with torch.no_grad():
        up, down = (push("direct", short, short + step * way, targets, 0.2).loss.item() for step in (1e-2, -1e-2))
    assert slope == pytest.approx((up - down) / 2e-2, rel=0.02) and abs(slope) > 1e-3


@pytest.fixture(scope="module")
def world():
    model = tiny_model(TOKENIZER, PACKER)
    batch = make(3, scenes=4, kinds=[0, 1, 2, 0])
    world = SimpleNamespace(model=model, batch=batch, targets=Targets(batch, BINS, PACKER.first_bin))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    for _ in range(60):  # until the shortcut pass has the answers of two scenes right
        losses = query_losses(adapted_cross_entropy(logits(world, model, shortcut=True), world.targets), world.targets)
        loss = losses[:2].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return world


def logits(world, model, **options):
    return model(
        **{name: world.batch[name] for name in INPUTS}, logits_to_keep=world.batch["labels"] >= 0, **options
    ).logits


@pytest.mark.parametrize("mu", [0.0, 0.7])
@pytest.mark.parametrize("lam", [0.1, 2.0])
def test_literal_is_plain_fine_tuning(world, mu, lam):
    "The same weights, bit for bit, after 4 steps; every other reading gives others."
    weights = {}
    for reading in ("none", "literal") if mu else READINGS:
        model = copy.deepcopy(world.model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.1)
        for _ in range(4):
            fused = logits(world, model)
            loss = align(fused, world.targets).loss + lam * deter(model, world.targets, fused, reading, mu).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights[reading] = torch.cat([p.detach().flatten() for p in model.parameters()])
    for reading, values in weights.items():
        assert torch.equal(values, weights["none"]) == (reading in ("none", "literal")), reading


@pytest.mark.parametrize("reading", READINGS)
def test_gate_and_parts(world, reading):
    "The gate, and the mean over parts of the batch, leave loss and gradient as they are."
    torch.manual_seed(0)
    moved = READINGS[reading].moved
    asked = Targets(displace(world.batch), BINS, PACKER.first_bin) if moved else world.targets
    similarities = similarity(shortcut_pass(world.model, asked, moved=moved), asked, greedy=reading == "score")
    best = similarities[:, [0, 3] if moved else slice(None)].amax(1).sort().values
    mu = best[1:3].mean().item()  # so that two scenes pass the gate

    def gradient(*terms):
        world.model.zero_grad()
        total = sum(terms)
        if total.requires_grad:
            total.backward()
        return total.item(), torch.cat(
            [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in world.model.parameters()]
        )

    def term(**options):
        torch.manual_seed(0)  # the same displacement, if there is one
        return deter(world.model, world.targets, logits(world, world.model), reading, mu, **options).loss

    torch.manual_seed(0)
    if READINGS[reading].gated:
        assert deter(world.model, world.targets, logits(world, world.model), reading, mu).active.any(1).sum() == 2
    whole, direction = gradient(term(gated=False))
    for other in (
        gradient(term(gated=True)),
        gradient(*(term(scenes=torch.arange(4) % 2 == part, items=int(world.targets.valid.sum())) for part in (0, 1))),
    ):
        assert other[0] == pytest.approx(whole, abs=1e-6)
        assert (other[1] - direction).abs().max() <= 1e-5 * max(direction.abs().max().item(), 1e-6)


def test_both_passes_of_the_gate_see_the_same_displacement(world):
    "Also where only some scenes are pushed on; the batch that was given stays as it is."
    given, seen = world.batch["geometry"].clone(), []
    handle = world.model.fusion.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    fused = logits(world, world.model)
    for scenes in (None, torch.tensor([True, False, True, True])):
        torch.manual_seed(0)
        acts = deter(world.model, world.targets, fused, "counterfactual", 0.0, scenes=scenes).active.any(1)
        assert acts.any()
        first, second = seen[-2:]
        assert torch.equal(first[acts], second)
    handle.remove()
    unmoved, everywhere, some = seen[0], seen[1], seen[3]
    assert (
        torch.equal(unmoved, given)
        and torch.equal(world.batch["geometry"], given)
        and torch.equal(everywhere[[0, 2, 3]], some)
    )
    assert (everywhere - given).abs().amax((1, 2)).min() > 1e-3

import csv
import inspect
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from advkd import losses, run, train_advkd
from advkd.checkpoints import checkpoint_due, read_checkpoint_state
from advkd.data import load_images, make_latent, seeded_noise
from advkd.devices import label, pick_device
from advkd.discriminator import make_discriminator
from advkd.presets import ASSETS, UserError, load_preset
from advkd.student import Student
from advkd.training import Plan
from advkd.trajectories import TrajectoryStore


@pytest.fixture(scope="module")
def images(improved):
    return load_images(improved, "train")[0][:32]


@pytest.fixture
def every(monkeypatch):
    """Set how often a checkpoint is written."""

    def change(steps):
        monkeypatch.setattr("advkd.checkpoints.CHECKPOINT_EVERY", steps)

    return change


def start(preset, store, images=None, student=None, **options):
    """A training, with the student and the critics it makes by stage."""
    student, critics = student or Student.from_preset(preset), {}

    def make_critic(k):
        critics[k] = make_discriminator(preset, k)
        return critics[k]

    records = train_advkd.train_advkd(student, make_critic, store, preset, images=images, device="cpu", **options)
    return student, critics, records


def snapshot(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def kernels(state, *prefixes):
    """Names of the convolutions and linear layers below the prefixes (a bias before a BatchNorm has no gradient)."""
    return {name for name, value in state.items() if value.ndim > 1 and name.startswith(prefixes)}


def same(a, b):
    return a.keys() == b.keys() and not changed(a, b)


def contents(folder):
    """Every file that a run leaves but the TensorBoard events, by its values."""
    files = [file for file in Path(folder).rglob("*") if file.is_file() and "logs" not in file.parts]
    read = {".safetensors": lambda file: {n: x.numpy().tobytes() for n, x in load_file(file).items()}}
    values = {str(f.relative_to(folder)): read.get(f.suffix, Path.read_bytes)(f) for f in files}
    if "run.json" in values:  # all of it but the time that it took
        values["run.json"] = {key: x for key, x in json.loads(values["run.json"]).items() if key not in run.CLOCKS}
    return values


def test_each_stage_trains_its_own_submodules_and_last_terminal(paper, store):
    student, critics, records = start(paper, store)
    states, seen = [snapshot(student)], []
    for record in records:
        seen.append((record.step, record.stage))
        if record.step in (3, 9, 18):
            states.append(snapshot(student))
    assert seen == [(step, 0 if step <= 3 else 1 if step <= 9 else 2) for step in range(1, 19)]
    for k, (before, after) in enumerate(pairwise(states)):
        layers = tuple(f"stages.{i}.layers." for i in range(k + 1))
        trained = (*layers, f"stages.{k}.terminal.")
        moved = changed(before, after)
        assert kernels(before, *trained) <= moved
        assert all(name.startswith(trained) for name in moved)
    assert sorted(critics) == [0, 1, 2]


def test_two_steps_of_stage_0_move_submodule_0_and_the_critic_within_its_clip(paper, store):
    student, critics, records = start(paper, store)
    before, critic_before = snapshot(student), snapshot(make_discriminator(paper, 0))
    for record in (next(records), next(records)):
        assert max(p.abs().max().item() for p in critics[0].parameters()) == pytest.approx(0.1)
        assert record.penalty > 0 and record.reconstruction_loss == 0
        assert record.critic_gradient > 0 and record.student_gradient > 0
    moved = changed(before, snapshot(student))
    assert kernels(before, "stages.0.") <= moved and all(name.startswith("stages.0.") for name in moved)
    assert [s.layers[0][0].weight.requires_grad for s in student.stages] == [True, False, False]
    clamped = {name: value.clamp(-0.1, 0.1) for name, value in critic_before.items()}
    assert kernels(critic_before) <= changed(clamped, snapshot(critics[0]))


def assert_close(module, other):
    """Convolutions and linear layers alike, to rounding."""
    mine, theirs = module.state_dict(), other.state_dict()
    for name in kernels(mine, ""):
        torch.testing.assert_close(mine[name], theirs[name], atol=2e-5, rtol=1e-3, msg=name)


def spy(monkeypatch, name):
    """The arguments of the last call of a loss."""
    original, arguments = getattr(losses, name), {}
    names = list(inspect.signature(original).parameters)

    def call(*given):
        arguments.update(zip(names, given, strict=True))
        return original(*given)

    monkeypatch.setattr(losses, name, call)
    return arguments


def test_a_step_of_the_papers_recipe_is_the_published_one(monkeypatch, paper, store):
    preset, penalised = paper, spy(monkeypatch, "gradient_penalty")
    trained, critics, records = start(preset, store)
    student, critic = Student.from_preset(preset).train(), make_discriminator(preset, 0).train()
    adam = dict(lr=1e-4, betas=(0.5, 0.999))
    optimizers = [
        torch.optim.Adam(critic.parameters(), **adam),
        torch.optim.Adam(student.stages[0].parameters(), **adam),
    ]
    plan = Plan(preset, len(store))
    for step in range(3):
        batch = plan.batch(step)
        latent, real = store.latents("shrink8bit")[batch], store.targets(0, "xt")[batch]
        fake = student(latent, 0)
        record = next(records)
        weight = penalised["weight"]
        assert weight.shape == (4, 1, 1, 1) and 0 <= weight.min() < weight.max() < 1
        critic_loss = F.softplus(-critic(real, latent)).mean() + F.softplus(critic(fake.detach(), latent)).mean()
        between = (fake.detach() + weight * (real - fake.detach())).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between, latent).sum(), between, create_graph=True)
        critic_loss = critic_loss + 10 * (slope.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
        optimizers[0].zero_grad()
        critic_loss.backward()
        optimizers[0].step()
        with torch.no_grad():
            for p in critic.parameters():
                p.clamp_(-0.1, 0.1)
        student_loss = F.softplus(-critic(fake, latent)).mean()
        optimizers[1].zero_grad()
        student_loss.backward()
        optimizers[1].step()
        assert record.critic_loss == pytest.approx(critic_loss.item(), rel=1e-4)
        assert record.student_loss == pytest.approx(student_loss.item(), rel=1e-4)
        assert record.images_seen == 4 * (step + 1)
    assert_close(critics[0], critic)
    assert_close(trained, student)


@pytest.mark.parametrize("feature_weight", [0.0, 0.2])
def test_a_step_of_the_improved_recipe_by_hand(monkeypatch, improved, store, images, feature_weight):
    preset = improved.replace(penalty_weight=0.5, penalty_every=2, reconstruction_weight=0.3, ema=0.0)
    preset = preset.replace(feature_weight=feature_weight)
    penalised, latents = spy(monkeypatch, "r1_penalty"), []
    trained, critics, records = start(preset, store, images)
    trained.stages[0].layers.register_forward_pre_hook(lambda _, args: latents.append(args[0].clone()))
    student, critic = Student.from_preset(preset).train(), make_discriminator(preset, 2).train()
    adam = dict(lr=preset.learning_rate, betas=preset.betas)
    optimizers = [torch.optim.Adam(module.parameters(), **adam) for module in (critic, student)]
    record, batch = next(records), Plan(preset, len(store)).batch(0)
    heads, real = student.images(latents[0]), penalised["real"].detach().requires_grad_()
    targets = [store.targets(k, "x0")[batch] for k in range(3)]
    assert torch.equal(real[: len(batch)], targets[2])
    (slope,) = torch.autograd.grad(critic(real).sum(), real, create_graph=True)
    critic_loss = F.softplus(-critic(real)).mean() + F.softplus(critic(heads[-1].detach())).mean()
    critic_loss = critic_loss + 0.5 * 2 * slope.square().sum((1, 2, 3)).mean()
    critic_loss.backward()
    optimizers[0].step()
    l1 = sum((head[: len(batch)] - target).abs().mean() for head, target in zip(heads, targets, strict=True))
    student_loss = F.softplus(-critic(heads[-1])).mean() + 0.3 * l1
    shown, wanted, matching = heads[-1][: len(batch)], targets[-1], []
    for layer in critic.image:
        shown, wanted = layer(shown), layer(wanted).detach()
        if isinstance(layer, nn.LeakyReLU):
            matching.append((shown - wanted).abs().sum() / wanted.abs().sum())
    student_loss = student_loss + feature_weight * torch.stack(matching).mean()
    student_loss.backward()
    optimizers[1].step()
    assert record.critic_loss == pytest.approx(critic_loss.item(), rel=1e-4)
    assert record.student_loss == pytest.approx(student_loss.item(), rel=1e-4)
    assert record.reconstruction_loss == pytest.approx(l1.item(), rel=1e-4)
    assert_close(critics[2], critic)
    assert_close(trained, student)


def test_joint_training_moves_every_submodule_head_and_the_critic(improved, store, images):
    student, critics, records = start(improved, store, images)
    before, critic_before = snapshot(student), snapshot(make_discriminator(improved, 2))
    next(records), next(records)
    assert kernels(before) <= changed(before, snapshot(student))
    assert kernels(critic_before) <= changed(critic_before, snapshot(critics[2]))
    assert list(critics) == [2]


def test_without_reconstruction_the_other_heads_stay(improved, store, images):
    student, _, records = start(improved.replace(reconstruction_weight=0.0), store, images)
    before = snapshot(student)
    next(records), next(records)
    moved = changed(before, snapshot(student))
    assert not [name for name in moved if name.startswith(("stages.0.terminal", "stages.1.terminal"))]
    assert kernels(before, "stages.0.layers", "stages.1.layers", "stages.2") <= moved


def test_the_student_ends_as_its_moving_average(improved, store, images):
    student, _, records = start(improved, store, images)
    weights = []
    for _ in records:
        weights.append(snapshot(student))
    raw, ended = weights[-1], snapshot(student)
    share = [0.9 ** (len(weights) - 1 - i) for i in range(len(weights))]  # of step i; no other weights count
    average = {
        name: sum(w * each[name] for w, each in zip(share, weights, strict=True)) / sum(share)
        for name in raw
        if raw[name].is_floating_point()
    }
    assert kernels(raw) <= changed(raw, ended)
    for name, value in average.items():
        torch.testing.assert_close(ended[name], value, atol=1e-6, rtol=1e-4)
    assert not student.training


def test_the_moving_average_of_a_stage_begins_with_it(improved, store, images):
    staged = improved.replace(schedule="staged", fresh_share=0.0, epochs=0.5)
    student, _, records = start(staged, store, images)
    last = [snapshot(student) for record in records if record.stage == 2]
    share = [0.9 ** (len(last) - 1 - i) for i in range(len(last))]
    name = "stages.2.terminal.0.weight" if "stages.2.terminal.0.weight" in last[0] else "stages.2.terminal.weight"
    expected = sum(w * each[name] for w, each in zip(share, last, strict=True)) / sum(share)
    torch.testing.assert_close(snapshot(student)[name], expected, atol=1e-6, rtol=1e-4)
    assert len(last) > 1 and not torch.equal(last[0][name], last[-1][name])


def test_without_a_moving_average_the_last_weights_are_left(paper, store):
    student, _, records = start(paper, store)
    for _ in records:
        raw = snapshot(student)
    assert same(raw, snapshot(student))
    assert all(p.requires_grad for p in student.parameters())


def test_penalty_is_lazy(improved, store, images):
    _, _, records = start(improved.replace(penalty_every=3), store, images)
    assert [record.penalty is None for record in records] == [False, True, True, False, True, True]


def test_reconstruction_loss_is_of_every_head_on_the_paired_part(improved, store, images):
    student, _, records = start(improved, store, images)
    reference, latents = Student.from_preset(improved).train(), []
    student.stages[0].layers.register_forward_pre_hook(lambda _, args: latents.append(args[0].clone()))
    record, batch = next(records), Plan(improved, len(store)).batch(0)
    assert len(latents) == 1 and latents[0].shape == (4, 1, 4, 4) and len(batch) == 2
    assert torch.equal(latents[0][:2], store.latents("block-mean")[batch])
    assert not [x for x in latents[0][2:] if (store.latents("block-mean") == x).flatten(1).all(1).any()]
    heads = reference.images(latents[0])
    errors = [(heads[k][:2] - store.targets(k, "x0")[batch]).abs().mean().item() for k in range(3)]
    assert record.reconstruction_loss == pytest.approx(sum(errors), rel=1e-4)


@pytest.mark.parametrize(("real_share", "from_batch", "from_others"), [(0.5, 2, 0), (0.25, 2, 1), (0.75, 1, 0)])
def test_what_the_critic_is_told_is_real(improved, store, images, real_share, from_batch, from_others):
    preset, seen = improved.replace(real_share=real_share), []

    def make_critic(k):
        critic = make_discriminator(preset, k)
        critic.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        return critic

    student = Student.from_preset(preset)
    next(train_advkd.train_advkd(student, make_critic, store, preset, images=images, device="cpu"))
    real, targets = seen[0], store.targets(2, "x0")
    batch = Plan(preset, len(store)).batch(0)
    assert len(real) == 4
    assert torch.equal(real[:from_batch], targets[batch[:from_batch]])
    teachers, photographed = real[from_batch : from_batch + from_others], real[from_batch + from_others :]
    assert all((targets == x).flatten(1).all(1).any() for x in teachers)
    assert len(photographed) == round(4 * real_share)
    assert all((images == x).flatten(1).all(1).any() for x in photographed)


def test_the_critic_sees_all_images_through_noise(improved, store, images):
    preset = improved.replace(critic_noise=0.5, penalty_every=100)
    student, critics, records = start(preset, store, images)
    seen, shown = [], []
    student.stages[2].terminal.register_forward_hook(lambda *args: shown.append(args[2].detach().float()))
    first = next(records)  # makes the critic
    critics[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    records = list(records)
    noise = torch.cat(
        [x - fake for fake, *views in zip(shown[1:], seen[1::3], seen[2::3], strict=False) for x in views]
    )
    assert noise.std() == pytest.approx(0.5, rel=0.05) and noise.mean().abs() < 0.05
    assert not torch.equal(noise[:4], noise[4:8]), "the student's step draws noise of its own"
    again = next(start(preset, store, images)[2])
    assert again == first


def test_a_head_without_supervision_adds_nothing(improved, store, images):
    every, without = (next(start(improved.replace(unsupervised=x), store, images)[2]) for x in ((), (1,)))
    heads = Student.from_preset(improved)
    alone = [next(start(improved.replace(unsupervised=x), store, images)[2]) for x in ((1, 2), (0, 2), (0, 1))]
    parts = [record.reconstruction_loss for record in alone]
    assert every.reconstruction_loss == pytest.approx(sum(parts), rel=1e-4)
    assert without.reconstruction_loss == pytest.approx(parts[0] + parts[2], rel=1e-4)
    student, _, records = start(improved.replace(unsupervised=(0,)), store, images, student=heads)
    before = snapshot(student)
    next(records)
    assert not [name for name in changed(before, snapshot(student)) if name.startswith("stages.0.terminal")]


def test_reconstruction_alone_does_not_ask_the_critic(improved, store, images):
    record = next(start(improved.replace(adversarial_weight=0.0), store, images)[2])
    assert record.student_loss == pytest.approx(0.3 * record.reconstruction_loss)


def test_the_full_noise_is_that_of_the_trajectories(improved, store, images):
    preset, latents = improved.replace(latent="full"), []
    student, _, records = start(preset, store, images)
    student.register_forward_pre_hook(lambda _, args: latents.append(args[0]))
    original = student.images
    student.images = lambda latent, *args, **kwargs: latents.append(latent.clone()) or original(latent, *args, **kwargs)
    next(records)
    batch = Plan(preset, len(store)).batch(0)
    noise = seeded_noise(range(12), (1, 16, 16), preset.trajectory_seed)
    assert latents[0].shape == (4, 1, 16, 16) and torch.equal(latents[0][:2], noise[batch])
    torch.testing.assert_close(make_latent(noise), store.latents("block-mean"))


def test_stages_of_the_papers_plan():
    plan = Plan(load_preset("celebahq", "paper"), 20_000)
    batches = [312] * 8 + [625, 1250, 1250]
    assert plan.stages == {k: 10 * (k + 1) * n for k, n in enumerate(batches)}
    assert plan.steps == sum(plan.stages.values())
    boundary = plan.stages[0] + plan.stages[1]
    assert [plan.stage_of(step) for step in (0, 3119, 3120, boundary - 1, boundary)] == [0, 0, 1, 1, 2]
    assert [plan.is_first(step) for step in (0, 1, 3119, 3120, 3121)] == [True, False, False, True, False]


def test_staged_epochs_are_permutations_without_the_incomplete_batch(paper):
    plan = Plan(paper, 14)  # batches of 4: three an epoch, two trajectories left out
    assert plan.stages == {0: 3, 1: 6, 2: 9}
    epochs = []
    for first in range(0, 18, 3):
        epoch = torch.cat([plan.batch(step) for step in range(first, first + 3)]).tolist()
        assert len(epoch) == len(set(epoch)) == 12 and set(epoch) <= set(range(14))
        epochs.append(epoch)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert set().union(*epochs) == set(range(14))
    again, other = Plan(paper, 14), Plan(paper.replace(seed=1), 14)
    assert torch.equal(again.batch(7), plan.batch(7)) and not torch.equal(other.batch(7), plan.batch(7))


def test_joint_batches_leave_room_for_fresh_latents(improved):
    plan = Plan(improved.replace(batch_sizes=(8,), fresh_share=0.25), 12)
    assert plan.stages == {2: 6}
    batches = [plan.batch(step) for step in range(6)]
    assert all(len(batch) == 6 and batch.min() >= 0 and batch.max() < 12 for batch in batches)
    assert len({tuple(batch.tolist()) for batch in batches}) == 6


def test_too_few_trajectories_for_a_batch_are_refused(paper):
    with pytest.raises(UserError, match="trajectories is 3, fewer than a batch of 4"):
        Plan(paper, 3)


def test_learning_rate_falls_linearly_at_the_end(improved):
    plan = Plan(improved.replace(steps=10, decay_share=0.4, learning_rate=0.8), 12)
    rates = [plan.learning_rate(step) for step in range(10)]
    assert rates == pytest.approx([0.8] * 7 + [0.6, 0.4, 0.2])
    constant = Plan(improved.replace(steps=10, decay_share=0), 12)
    assert {constant.learning_rate(step) for step in range(10)} == {improved.learning_rate}


@pytest.mark.parametrize(("recipe", "steps", "stop"), [("improved", 2, 4), ("paper", 2, 8), ("paper", 3, 4)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(request, tmp_path, every, store, images, recipe, steps, stop):
    """Stopped within a stage, right behind a checkpoint, and in the first step of a stage."""
    preset = request.getfixturevalue(recipe)
    every(steps)
    options = {"images": images if preset.real_share else None, "device": "cpu"}
    whole = list(run.train_run(preset, store, tmp_path / "whole", **options))
    interrupted = run.train_run(preset, store, tmp_path / "parts", **options)
    assert [next(interrupted) for _ in range(stop)] == whole[:stop]
    interrupted.close()
    checkpoint = read_checkpoint_state(tmp_path / "parts" / "checkpoint.safetensors")
    assert checkpoint["step"] == (stop - 1) // steps * steps
    assert not (tmp_path / "parts" / "student").exists()
    torch.manual_seed(99)  # another process has another global random state
    assert list(run.train_run(preset, store, tmp_path / "parts", **options)) == whole
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert whole == run.read_curves(tmp_path / "whole")


def test_a_finished_run_is_only_read_and_holds_no_pickle(tmp_path, every, paper, store):
    every(5)
    records = list(run.train_run(paper, store, tmp_path, device="cpu"))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert list(run.train_run(paper, store, tmp_path, device="cpu")) == records
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()} == files
    kept = [file for file in files if file.parent != tmp_path / "logs"]
    assert {file.suffix for file in kept} == {".safetensors", ".json", ".csv", ".md", ".png"}
    assert all(file.name.startswith("events.out.tfevents") for file in files if file not in kept)
    assert {file.name for file in kept} >= {"checkpoint.safetensors", "curves.csv", "run.json", "model_index.json"}
    with (tmp_path / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 19))
    assert [float(row["student_loss"]) for row in rows] == [record.student_loss for record in records]
    assert [record.images_seen for record in records] == [4 * step for step in range(1, 19)]


def test_the_finished_run_is_the_trained_student(tmp_path, improved, store, images):
    student, _, records = start(improved, store, images)
    list(records)
    run.finish(run.train_run(improved, store, tmp_path, images=images, device="cpu"))
    assert same(snapshot(student), snapshot(run.load_run(tmp_path).student))


def test_a_used_folder_is_refused_without_resume_and_with_another_preset(tmp_path, paper, store):
    run.finish(run.train_run(paper, store, tmp_path, device="cpu"))
    before = contents(tmp_path)
    with pytest.raises(UserError, match="holds a run already; go on with --resume"):
        next(run.train_run(paper, store, tmp_path, resume=False, device="cpu"))
    with pytest.raises(UserError, match=r"belongs to another preset \(learning_rate: made with 0.0001, wanted 0.5\)"):
        next(run.train_run(paper.replace(learning_rate=0.5), store, tmp_path, device="cpu"))
    assert contents(tmp_path) == before


def test_a_folder_of_unknown_origin_is_refused(tmp_path, paper, store):
    run.finish(run.train_run(paper, store, tmp_path, device="cpu"))
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match=r"does not say what it holds \(no run\.json\)"):
        next(run.train_run(paper, store, tmp_path, device="cpu"))


@pytest.mark.parametrize(
    "total, first", [(12, [12]), (60, [50, 60]), (720, [72, 144, 216]), (3500, [350, 700]), (10_000, [500, 1000])]
)
def test_a_short_training_loses_no_more_than_a_tenth(total, first):
    due = [step for step in range(1, total + 1) if checkpoint_due(step, total)]
    assert due[: len(first)] == first and due[-1] == total


def test_a_finished_run_needs_no_checkpoint(tmp_path, paper, store):
    records = list(run.train_run(paper, store, tmp_path, device="cpu"))
    (tmp_path / "checkpoint.safetensors").unlink()
    assert list(run.train_run(paper, store, tmp_path, device="cpu")) == records


def test_a_run_says_what_it_was_made_from(tmp_path, paper, store):
    run.finish(run.train_run(paper, store, tmp_path, device="cpu"))
    made = run.read_run(tmp_path)
    assert made["preset"]["recipe"] == "paper" and made["trajectories"] == store.config and made["device"] == "cpu"
    assert run.read_run(tmp_path / "student") == made
    assert run.read_run(tmp_path / "another") is None
    for damaged in ("{", '{"id": 1}', "[]"):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(UserError, match=r"run\.json does not describe a run"):
            run.read_run(tmp_path)


def test_a_call_that_failed_early_leaves_the_folder_free(tmp_path, improved, store, images):
    with pytest.raises(UserError, match="no real images were given"):
        next(run.train_run(improved, store, tmp_path, device="cpu"))
    other = improved.replace(steps=2)
    assert len(list(run.train_run(other, store, tmp_path, images=images, device="cpu"))) == 2
    assert run.read_run(tmp_path)["preset"]["steps"] == 2


def test_a_setting_written_as_another_number_is_the_same(tmp_path, paper, store):
    run.finish(run.train_run(paper.replace(epochs=1), store, tmp_path, device="cpu"))
    run.finish(run.train_run(paper.replace(epochs=1.0), store, tmp_path, device="cpu"))


def test_a_foreign_or_damaged_student_is_refused(tmp_path, paper, store):
    run.finish(run.train_run(paper, store, tmp_path, device="cpu"))
    weights = next((tmp_path / "student" / "student").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-50])
    for folder in (tmp_path, ASSETS / "digits-teacher"):
        with pytest.raises(UserError, match="holds no readable student"):
            run.load_run(folder)


def test_a_checkpoint_of_another_preset_is_refused(tmp_path, paper, store):
    checkpoint = tmp_path / "checkpoint.safetensors"
    run.finish(start(paper, store, checkpoint=checkpoint)[2])
    other = paper.replace(penalty_weight=1.0, seed=3)
    message = r"another preset \(penalty_weight: made with 10.0, wanted 1.0; seed: made with 0, wanted 3\)"
    with pytest.raises(UserError, match=message):
        next(start(other, store, checkpoint=checkpoint, resume=True)[2])


def test_a_damaged_checkpoint_is_named(tmp_path, paper, store):
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is not a readable checkpoint"):
        next(start(paper, store, checkpoint=checkpoint, resume=True)[2])


def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_checkpoint(tmp_path, every, paper, store):
    every(2)
    student, _, records = start(paper, store, checkpoint=tmp_path / "checkpoint.safetensors")
    for _ in range(5):
        next(records)
    nn.init.constant_(student.stages[1].terminal[0].weight, math.nan)
    with pytest.raises(
        UserError, match=r"a loss or gradient is not finite at step 6 \(stage 1\); the last checkpoint is kept"
    ):
        next(records)
    assert read_checkpoint_state(tmp_path / "checkpoint.safetensors")["step"] == 4
    assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoint.safetensors").values())


def test_real_images_are_wanted_where_they_have_a_share(improved, store):
    with pytest.raises(UserError, match=r"real_share is 0\.5, but no real images were given"):
        next(start(improved.replace(real_share=0.5), store)[2])


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type in ("cuda", "mps", "cpu")
    with pytest.raises(UserError, match=r"device 'tpu' is not available here; available: .*cpu"):
        pick_device("tpu")


def test_rows_name_the_gpu_and_the_torch_that_made_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert label(torch.device("cpu")) == "cpu"
    assert label(torch.device("cuda", 1)) == "cuda:1 (NVIDIA H100, torch 2.11.0)"


def test_training_leaves_the_global_random_state_alone(improved, store, images):
    _, _, records = start(improved, store, images)
    state = torch.get_rng_state()
    next(records)
    assert torch.equal(torch.get_rng_state(), state)


def test_run_folders_tell_presets_and_trajectories_apart(improved, paper, store):
    other = TrajectoryStore(store.folder)
    other.config = store.config | {"teacher_fingerprint": "another"}
    folders = {
        run.run_dir(improved, store),
        run.run_dir(improved.replace(seed=1), store),
        run.run_dir(paper, store),
        run.run_dir(improved, other),
    }
    assert len(folders) == 4
    assert all(folder.parts[:2] == ("runs", "digits") for folder in folders)


def test_a_checkpoint_of_other_trajectories_is_refused(improved, store, images, tmp_path):
    run.finish(run.train_run(improved, store, tmp_path, images=images, device="cpu"))
    other = TrajectoryStore(store.folder)
    other.config = store.config | {"teacher_fingerprint": "another"}
    with pytest.raises(UserError, match=r"teacher_fingerprint: made with .*, wanted 'another'"):
        run.finish(run.train_run(improved, other, tmp_path, images=images, device="cpu"))

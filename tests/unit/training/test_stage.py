"""Stages train_offline and train_online on a tiny real target: equal losses, a real kill, first weights."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from specflow.config import parse_params
from specflow.data import vocab
from specflow.drafters.eagle3 import load_draft
from specflow.errors import UserError
from specflow.export.speculators import save_speculators
from specflow.extract import stage as extract
from specflow.files import read_json, sha256_file
from specflow.targets.model import load_lm_head, load_model, load_tensor
from specflow.training import stage
from specflow.training.initial import copy_from_target, initial_draft
from specflow.training.loop import Trainer
from tests.captures import tiny_project, write_split
from tests.toys import make_tiny_target, tiny_params
from tests.unit.export.test_imports import make_draft
from tests.unit.extract.test_stage import make_samples

OFFLINE, ONLINE = SimpleNamespace(run=stage.run_offline), SimpleNamespace(run=stage.run_online)
TRAIN = {"ttt_steps": 3, "epochs": 2, "batch_tokens": 200, "lr": 1e-2, "evals": 2, "checkpoints": 8}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_tiny_target(tmp_path_factory.mktemp("target") / "tiny")


def make_project(root, target, **train):
    project = tiny_project(root, target)
    project.settings["families"]["tiny"]["train"] = TRAIN | train
    project.params = parse_params(project.settings)
    write_split(project.paths.samples, make_samples(20), make_samples(6, prefix="e"))
    project.run(vocab)
    project.run(extract)
    return project


def curves(project):
    return [
        read_json(project.paths.plot(name), what="curve", made_by="train") for name in ("training.json", "eval.json")
    ]


def test_offline_and_online_give_the_same_losses_step_for_step(tmp_path, target):
    project = make_project(tmp_path, target)
    project.run(OFFLINE)
    offline = curves(project)
    project.run(ONLINE)
    online = curves(project)
    assert len(offline[0]) == len(online[0]) > 5
    for a, b in zip(offline[0] + offline[1], online[0] + online[1], strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert offline[0][0]["loss"] != pytest.approx(offline[0][-1]["loss"], abs=1e-3)  # something was learned


def test_killed_and_resumed_equals_uninterrupted_bitwise(tmp_path, target):
    whole = make_project(tmp_path / "whole", target)
    whole.run(OFFLINE)
    cut = make_project(tmp_path / "cut", target)
    patch = (
        "stage.run = stage.run_offline\n"
        "from specflow.training.loop import Trainer\n"
        "step = Trainer.step\n"
        "Trainer.step = lambda self, group, number: kill() if number == 5 else step(self, group, number)\n"
        "extra = None"
    )
    cut.run_killed("specflow.training.stage", patch)
    assert not cut.paths.draft.exists()
    assert len(list((cut.paths.state / "checkpoints").glob("*/last.pt"))) == 1
    # the child ran on one thread; so must what it is compared with
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cut.run(OFFLINE)
        again = make_project(tmp_path / "again", target)
        again.run(OFFLINE)
    finally:
        torch.set_num_threads(threads)
    expected = load_file(again.paths.draft / "model.safetensors")
    got = load_file(cut.paths.draft / "model.safetensors")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert curves(cut) == curves(again)
    assert not list((cut.paths.state / "checkpoints").iterdir())  # the draft is saved


def test_two_points_of_a_sweep_side_by_side_each_resume_at_their_own_step(tmp_path, target, monkeypatch):
    """Real processes of one family, killed while both live; neither removes what the other needs."""
    points = [make_project(tmp_path, target), make_project(tmp_path, target)]
    points[1].settings["families"]["tiny"]["train"] = TRAIN | {"lr": 2e-2}
    points[1].params = parse_params(points[1].settings)
    running = []
    for point, last in zip(points, (4, 6), strict=True):
        patch = (
            "stage.run = stage.run_offline\n"
            "import time\nfrom specflow.training.checkpoint import Checkpoints\n"
            "save = Checkpoints.save\n"
            "def saving(self, progress, draft, optimizer):\n"
            "    save(self, progress, draft, optimizer)\n"
            "    while len(list(self.path.parent.parent.glob('*/last.pt'))) < 2: time.sleep(0.05)\n"
            f"    if progress.step >= {last}: kill()\n"
            "Checkpoints.save = saving"
        )
        running.append(point.start_killed("specflow.training.stage", patch))
    for process in running:
        _, said = process.communicate(timeout=240)
        assert process.returncode == -9, said
    first, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, group, number: first.append(number) or step(self, group, number))
    starts = []
    for point in points:
        first.clear()
        point.run(OFFLINE)
        starts.append(first[0])
        assert first[-1] == len(curves(point)[0]) - 1
    assert 4 <= starts[0] < starts[1] and starts[1] >= 6
    assert not list((points[0].paths.state / "checkpoints").iterdir())


def test_first_weights_are_the_targets_own(tmp_path, target):
    project = make_project(tmp_path, target)
    facts, cache = project.facts, project.paths.cache
    draft = initial_draft(facts, project.family, cache, project.paths.vocab, [1, 2, 3])
    last = f"model.layers.{facts.num_hidden_layers - 1}."
    assert torch.equal(draft.gate_proj.weight, load_tensor(facts, cache, last + "mlp.gate_proj.weight"))
    assert torch.equal(draft.o_proj.weight, load_tensor(facts, cache, last + "self_attn.o_proj.weight"))
    assert torch.equal(draft.norm.weight, load_tensor(facts, cache, "model.norm.weight"))
    kept = torch.arange(len(draft.d2t)) + draft.d2t
    assert torch.equal(draft.lm_head.weight, load_lm_head(facts, cache)[kept])


def test_a_part_that_does_not_fit_is_one_line(tmp_path, target):
    project = make_project(tmp_path, target, intermediate_size=8)
    with pytest.raises(UserError, match=r"init_from_target mlp: target has .* take mlp out of it"):
        initial_draft(project.facts, project.family, project.paths.cache, project.paths.vocab, [1, 2, 3])


def test_an_unknown_layer_layout_is_one_line(tmp_path, target):
    project = make_project(tmp_path, target)
    draft = initial_draft(project.facts, project.family, project.paths.cache, project.paths.vocab, [1, 2, 3])
    facts = project.facts.model_copy(update={"num_hidden_layers": 99})
    with pytest.raises(UserError, match=r"no single layers.98.mlp.gate_proj.weight"):
        copy_from_target(draft, facts, project.paths.cache, ["mlp"])


def test_a_manifest_of_another_layer_set_is_one_line(tmp_path, target):
    project = make_project(tmp_path, target)
    project.settings["families"]["tiny"]["extract"]["aux_layer_ids"] = [0, 1, 2]
    project.params = parse_params(project.settings)
    with pytest.raises(UserError, match="aux_layer_ids"):
        project.run(OFFLINE)


def test_the_targets_choice_equals_transformers_argmax(tmp_path, target):
    """The state kept before each supervised token, through the head, is the target's own next-token choice."""
    from specflow.hidden_states import HiddenStateStore
    from specflow.training.evaluate import target_choices
    from specflow.training.features import StoredFeatures
    from specflow.training.packing import pack

    project = make_project(tmp_path, target)
    features = StoredFeatures(HiddenStateStore.open(project.paths.manifest))
    model = load_model(project.facts, project.paths.cache)
    rows = features.rows("eval")
    documents = features.documents(rows)
    got = target_choices(pack(documents, 3), load_lm_head(project.facts, project.paths.cache))
    expected = []
    for document in documents:
        choices = model(document.token_ids[None]).logits[0].argmax(-1)
        for start, end in document.spans:
            expected.append(choices[start - 1 : end - 1])
    assert torch.equal(got, torch.cat(expected))


def test_an_earlier_draft_without_epochs_is_evaluated_as_it_is(tmp_path, target):
    """Own vocabulary and norms are kept; with epochs the head follows this run's vocabulary by token."""
    facts = tiny_project(tmp_path / "facts", target).facts
    theirs = make_draft(facts, fc_norm=True, norm_output=True)
    save_speculators(theirs, facts, tmp_path / "theirs", verifier="org/name", num_speculative_tokens=3)
    project = make_project(tmp_path / "as-is", target, epochs=0, init_from=str(tmp_path / "theirs"))
    with pytest.raises(UserError, match=r"reads aux layers \[2, 3, 5\], extract.aux_layer_ids are \[2, 3, 4\]"):
        project.settings["families"]["tiny"]["extract"]["aux_layer_ids"] = [2, 3, 4]
        project.params = parse_params(project.settings)
        project.run(extract)
        project.run(OFFLINE)
    project.settings["families"]["tiny"]["extract"]["aux_layer_ids"] = [2, 3, 5]
    project.params = parse_params(project.settings)
    project.run(extract)
    project.settings["families"]["tiny"]["train"]["init_from_sha256"] = "0" * 64
    project.params = parse_params(project.settings)
    digest = sha256_file(tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(
        UserError, match=rf"has weights of sha256 {digest}, expected 0000.* correct train.init_from_sha"
    ):
        project.run(OFFLINE)
    project.settings["families"]["tiny"]["train"]["init_from_sha256"] = digest
    project.params = parse_params(project.settings)
    metrics = project.run(OFFLINE)
    kept = load_draft(project.paths.draft)
    assert kept.config == theirs.config
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, kept.state_dict()[name]), name
    training, evaluation = curves(project)
    assert training == [] and len(evaluation) == 1
    assert metrics["expected_acceptance_length"] == evaluation[0]["expected_acceptance_length"]

    project.settings["families"]["tiny"]["train"]["epochs"] = 4
    project.params = parse_params(project.settings)
    project.run(OFFLINE)
    assert load_draft(project.paths.draft).config.draft_vocab_size == 64
    losses = [point["loss"] for point in curves(project)[0]]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_an_earlier_drafts_head_follows_its_tokens_in_whatever_order_they_are(tmp_path, target):
    """The same draft with its head's rows in another order, and d2t with them, is the same draft."""
    project = tiny_project(tmp_path / "project", target)
    project.paths.vocab.mkdir(parents=True)
    known = torch.arange(20, 84)
    t2d = torch.zeros(project.facts.vocab_size, dtype=torch.bool).index_fill_(0, known, True)
    save_file({"d2t": known - torch.arange(64), "t2d": t2d}, project.paths.vocab / "vocab.safetensors")
    earlier = make_draft(project.facts)
    tokens = earlier.d2t + torch.arange(100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    found = []
    for place in (torch.arange(100), order):
        draft = make_draft(project.facts)
        with torch.no_grad():
            draft.lm_head.weight.copy_(earlier.lm_head.weight[place])
            draft.d2t.copy_(tokens[place] - torch.arange(100))
        folder = tmp_path / f"theirs-{len(found)}"
        save_speculators(draft, project.facts, folder, verifier="org/name", num_speculative_tokens=3)
        family = project.family.model_copy(
            update={"train": project.family.train.model_copy(update={"init_from": str(folder)})}
        )
        found.append(initial_draft(project.facts, family, project.paths.cache, project.paths.vocab, [2, 3, 5]))
    for token, row in zip(known.tolist(), found[1].lm_head.weight, strict=True):
        at = (tokens == token).nonzero()
        assert torch.equal(row, earlier.lm_head.weight[at[0, 0]] if len(at) else torch.zeros(32))
    assert torch.equal(found[0].lm_head.weight, found[1].lm_head.weight)


def test_other_weights_in_the_same_folder_do_not_resume_the_old_run(tmp_path, target):
    facts = tiny_project(tmp_path / "facts", target).facts
    theirs = tmp_path / "theirs"
    drafts = []
    for scale in (1.0, 0.5):
        earlier = make_draft(facts)
        with torch.no_grad():
            earlier.fc.weight.mul_(scale)
        save_speculators(earlier, facts, theirs, verifier="org/name", num_speculative_tokens=3)
        if not drafts:
            project = make_project(tmp_path / "project", target, init_from=str(theirs))
            project.settings["families"]["tiny"]["extract"]["aux_layer_ids"] = [2, 3, 5]
            project.params = parse_params(project.settings)
            project.run(extract)
        project.run(OFFLINE)
        drafts.append(load_draft(project.paths.draft).fc.weight)
    assert (drafts[0] - drafts[1]).abs().max() > 0.01  # the second run did not go on from the first one's checkpoint


def test_no_epochs_and_no_draft_is_one_line(tmp_path):
    settings = tiny_params(tmp_path)
    settings["families"]["tiny"]["train"]["epochs"] = 0
    with pytest.raises(UserError, match=r"takes the draft of train.init_from as it is: name one"):
        parse_params(settings)

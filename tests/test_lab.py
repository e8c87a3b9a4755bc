"""The lab's world by hand, and the shipped base against its recipe."""

import hashlib
import json
from pathlib import Path

import pytest

from sdft_dist.errors import UserError
from sdft_dist.lab import base, world
from sdft_dist.lab.base import BaseSettings, build, shipped_base
from sdft_dist.lab.teaching import write_teaching_set


def test_skills_by_hand():
    xs = (0, 3, 11, 5, 2)
    assert world.SKILLS["rev"](xs) == (2, 5, 11, 3, 0)
    assert world.SKILLS["rotl"](xs) == (3, 11, 5, 2, 0)
    assert world.SKILLS["succ"](xs) == (1, 4, 0, 6, 3)
    assert world.SKILLS["swap"](xs) == (2, 3, 11, 5, 0)


def test_score_reads_symbols_whatever_the_style():
    assert world.score("rev answer a1 a2 a3 a4 a5 done", "a1 a2 a3 a4 a5")
    assert world.score("thus a1 a2 a3 a4 a5 end", "a1 a2 a3 a4 a5")
    assert not world.score("thus a1 a2 a3 a5 a4 end", "a1 a2 a3 a4 a5")
    assert not world.score("thus a1 a2 a3 a4 end", "a1 a2 a3 a4 a5")


def test_the_base_never_sees_the_teaching_style():
    stream = world.base_examples(0)
    texts = [" ".join(next(stream)) for _ in range(2000)]
    assert not any("thus" in text for text in texts)
    shares = [sum("example" in t for t in texts) / 2000, sum(t.startswith("t") for t in texts) / 2000]
    assert shares == pytest.approx([0.55, 0.40], abs=0.04)


def test_held_out_questions_are_not_taught(tmp_path):
    write_teaching_set(tmp_path, "t35", "a", seed=0)
    prompts = {
        name: {json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").open()}
        for name in ("train", "eval-new")
    }
    assert not prompts["train"] & prompts["eval-new"]


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    settings = BaseSettings(steps=3, warmup_steps=1, batch_size=8)
    folders = [build(tmp_path / name, settings, lambda *_: None) for name in ("one", "two")]
    digests = {hashlib.sha256((f / "model.safetensors").read_bytes()).hexdigest() for f in folders}
    assert len(digests) == 1
    build(folders[0], settings, lambda *_: pytest.fail("a cached base is not built again"))
    with pytest.raises(UserError, match=r"--out: .*is not empty and does not hold this base"):
        build(folders[0], BaseSettings(steps=4), lambda *_: None)


@pytest.mark.parametrize("out", [".", "new/.."])
def test_a_base_is_made_under_a_name(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_train", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=f"--out: {out} has no name to be made under: give the path of a new folder"):
        build(Path(out), BaseSettings(), lambda *_: None)


def test_a_base_of_no_more_steps_than_the_warm_up_is_made_too(tmp_path):
    build(tmp_path / "base", BaseSettings(steps=2, warmup_steps=2, batch_size=4), lambda *_: None)


def test_the_shipped_base_is_of_the_default_settings():
    assert json.loads((shipped_base() / "lab.json").read_text())["key"] == BaseSettings().key()
    assert sum(p.stat().st_size for p in shipped_base().iterdir()) < 4 << 20


def accuracy(folder, skills):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def right(prompts, answers):
        chats = [[{"role": "user", "content": p}] for p in prompts]
        ids = [tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in chats]
        out = lm.generate(torch.tensor(ids), max_new_tokens=10, do_sample=False)[:, len(ids[0]) :]
        return sum(world.score(tokenizer.decode(o), a) for o, a in zip(out, answers, strict=True)) / len(answers)

    result = {}
    for skill in skills:
        rows = world.rows(skill, "a", 60, seed=-7)
        shown = [world.TEACHER_TEMPLATE.format(prompt=r.prompt, demonstration=r.demonstration) for r in rows]
        answers = [r.answer for r in rows]
        result[skill] = (right([r.prompt for r in rows], answers), right(shown, answers))
    return result


def knows_the_old_and_can_read_a_demonstration(folder):
    result = accuracy(folder, [*world.OLD_SKILLS, "t35"])
    for skill in world.OLD_SKILLS:
        assert result[skill][0] >= 0.98, result
    assert result["t35"][0] <= 0.1, result
    assert result["t35"][1] >= 0.98, result


def test_the_shipped_base_knows_the_old_skills_and_reads_demonstrations():
    knows_the_old_and_can_read_a_demonstration(shipped_base())


def test_the_recipe_begins_as_the_shipped_base_did(tmp_path):
    """Its first losses are those of the day when the base was made; `make test-all` goes through to the end."""
    found = {}

    def ten_steps(step, loss):
        found[step] = loss
        if step == 10:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        build(tmp_path / "base", BaseSettings(), ten_steps)
    assert (found[1], found[5], found[10]) == pytest.approx((4.60136, 4.41922, 4.12348), rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_recipe_still_makes_an_equivalent_base(tmp_path):
    knows_the_old_and_can_read_a_demonstration(build(tmp_path / "base", BaseSettings(), lambda *_: None))

"""Configuration mistakes name the field, the value and the nearest valid name."""

import pytest

from sdft_dist.config import Config
from sdft_dist.errors import ConfigError
from sdft_dist.recipe import dump_config, load_config, parse

MINIMAL = "model: {path: m}\ndata: {train: d.jsonl}\n"
STUDENTS_TOP_5 = ["loss.support=topk", "loss.topk_from=student", "loss.top_k=5"]
SCORE_FUNCTION = ["loss.support=sampled", "loss.tail=false", "loss.divergence=reverse_kl"]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_and_scientific_notation(recipe):
    config = load_config(recipe, ["optim.learning_rate=1e-5", "learner.zero_stage=3", "loss.divergence=reverse_kl"])
    assert config.optim.learning_rate == 1e-5
    assert config.learner.zero_stage == 3
    assert config.loss.divergence == "reverse_kl"


def test_a_section_as_an_override_replaces_what_it_names_and_a_mapping_is_replaced_whole(recipe):
    layers = ["loss.skip_first_tokens=3", "eval.sets={old: a.jsonl}"]
    for override in ("loss={divergence: reverse_kl}", {"loss": {"divergence": "reverse_kl"}}):
        loss = load_config(recipe, [*layers, override]).loss
        assert (loss.divergence, loss.skip_first_tokens) == ("reverse_kl", 3)
    assert load_config(recipe, [*layers, "eval.sets={new: b.jsonl}"]).eval.sets == {"new": "b.jsonl"}


def test_what_only_looks_like_a_number_stays_text(recipe):
    for given, read in (("7e12345", "7e12345"), ("'7e12'", "7e12"), ('"1e-5"', "1e-5"), ("inf", "inf")):
        assert load_config(recipe, [f"model.revision={given}"]).model.revision == read


def test_a_dumped_configuration_reads_back_the_same(recipe, tmp_path):
    config = load_config(recipe, ["eval.sets={new: a.jsonl}", "prompt.template='é {prompt} {demonstration}'"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rat=1", "optim.learning_rat: no such field; did you mean optim.learning_rate?"),
        ("lern=1", "lern: no such field"),
        ("lora.rank=8", "lora: no such field; did you mean model.lora?"),
        ("timeout_s=8", "did you mean cluster.timeout_s or eval.judge.timeout_s?"),
        ("model=Qwen/Qwen3-4B", "model: got 'Qwen/Qwen3-4B', but it is a section; did you mean model.path=…?"),
        ("eval.judge=gpt", "eval.judge: got 'gpt', but it is a section; did you mean eval.judge.url=…?"),
        ("loss.divergence=kl", "loss.divergence: got 'kl': Input should be 'forward_kl', 'reverse_kl' or 'jsd'"),
        ("optim.learning_rate=-1", "optim.learning_rate: got -1: Input should be greater than 0"),
        ("rollout.max_completion_tokens=5000", "leaves no room for a prompt in model.max_length=4096"),
        ("eval.max_completion_tokens=4096", "eval.max_completion_tokens: 4096 leaves no room"),
        ("prompt.template=hello", "prompt.template: does not contain {prompt}"),
        ("steps", "an override reads section.field=value"),
        ("model.path.x=1", "path is a value, not a section"),
        ("eval.every=5", "eval.every: there is nothing to evaluate"),
        ("teacher.reanchor=false", "teacher.anchor: is where the teacher starts when teacher.reanchor is false"),
        ("epochs=inf", "epochs: got 'inf': Input should be a finite number"),
        ("epochs=1e308", "epochs: got 1e+308: Input should be less than or equal to 1000000"),
        ("rollout.temperature=0.009", "rollout.temperature: got 0.009: Input should be greater than or equal to 0.01"),
        (
            "loss.skip_first_tokens=1024",
            "loss.skip_first_tokens: 1024 leaves nothing to train on of completions of "
            "rollout.max_completion_tokens=1024: lower it",
        ),
        ("optim.grad_clip=.nan", "optim.grad_clip: got nan: Input should be a finite number"),
        ("optim.betas=[1.5, 0.9]", "optim.betas.0: got 1.5: Input should be less than 1"),
        ("optim.betas=[0.9, -1]", "optim.betas.1: got -1: Input should be greater than or equal to 0"),
        ("seed=4294967296", "seed: got 4294967296: Input should be less than 4294967296"),
        ("steps=true", "steps: got True: expected a number, not true or false"),
        ("learner.zero_stage=false", "learner.zero_stage: got False: expected a number, not true or false"),
        ("eval.sets={a: x, a: y}", "a: is there more than once in eval.sets, expected each name once"),
        ("data.train=" + "[" * 2000, "data.train: not valid YAML for settings: it is nested too deeply"),
        (
            "prompt.template={prompt} {demonstration}",
            "Text that begins with { needs quotes of its own: prompt.template='\"{…\"'",
        ),
        ("steps=2024-13-45", "steps: not valid YAML: month must be in 1..12"),
    ],
)
def test_mistakes(recipe, override, message):
    with pytest.raises(ConfigError) as e:
        load_config(recipe, [override])
    assert message in str(e.value)


def test_missing_fields_and_files(tmp_path):
    with pytest.raises(ConfigError, match="model: is required and missing"):
        parse(Config, {"data": {"train": "x"}})
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder, expected a YAML file"):
        load_config(tmp_path)
    for name in ("rows.jsonl", "rows.parquet"):
        (tmp_path / name).write_text("{}")
        told = f"{name}: holds rows, expected a YAML file; rows are given as data.train=.*{name}"
        with pytest.raises(ConfigError, match=told):
            load_config(tmp_path / name)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize("sections", [{}, {"model": {"path": "m"}}, {"data": {"train": "d"}}])
def test_a_layer_alone_is_told_once_what_it_goes_over(sections):
    with pytest.raises(ConfigError) as e:
        parse(Config, sections | {"learner": {"ranks": 4}})
    lines = str(e.value).splitlines()
    assert len(lines) == 2 - len(sections)
    assert str(e.value).count("go over a preset: sdft train deploy/recipes/paper.yaml SIZE.yaml") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "data: {train: e.jsonl}\n", "data: is there more than once in .*recipe.yaml, expected each name"),
        ("model: {path: m, path: n}\n", "model.path: is there more than once"),
        ("a: [{b: 1, b: 2}]\n", "a.b: is there more than once"),
        ("a: " + "{b: " * 2000, "recipe.yaml: not valid YAML for settings: it is nested too deeply, or in itself"),
        ("a: &a {b: *a}\n", "it is nested too deeply, or in itself"),
    ],
)
def test_files_that_yaml_would_take_and_no_recipe_is(recipe, text, message):
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(recipe)


def test_switches_are_still_given_by_0_and_1(recipe):
    assert load_config(recipe, ["trace=1"]).trace is True


def test_nothing_changes_it_after_parsing(recipe):
    with pytest.raises(Exception, match="frozen"):
        load_config(recipe).steps = 3


def test_every_field_is_described():
    def fields(model):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation)
            else:
                yield name, field.description

    undescribed = [name for name, description in fields(Config) if not description]
    assert not undescribed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.support=sampled", "loss.tail=false"], "support=sampled has one category and forward_kl is always 0"),
        (["loss.importance=token", "rollout.top_p=0.9"], "rollout.top_p and rollout.top_k bias the weights"),
        (["loss.importance=token", "rollout.top_k=5"], "rollout.top_p and rollout.top_k bias the weights"),
        (["loss.importance=token", "rollout.from_teacher=true"], "the samples are not the student's"),
        ([*STUDENTS_TOP_5, "rollout.from_teacher=true"], "use teacher"),
        ([*STUDENTS_TOP_5, "rollout.top_k=4"], "takes loss.top_k=5 ids, but rollout.top_p=1 and rollout.top_k=4 leave"),
        ([*STUDENTS_TOP_5, "rollout.top_p=0.9"], "but rollout.top_p=0.9 and rollout.top_k=0 leave fewer"),
        ([*SCORE_FUNCTION, "rollout.from_teacher=true"], "needs samples of the student's whole distribution"),
        ([*SCORE_FUNCTION, "rollout.top_p=0.9"], "needs samples of the student's whole distribution"),
        ([*SCORE_FUNCTION, "rollout.top_k=5"], "needs samples of the student's whole distribution"),
        (["teacher.kind=live", "teacher.reanchor=false", "teacher.anchor=a"], "live the teacher is the student itself"),
        (["model.dtype=bfloat16", "learner.zero_stage=0"], "0 keeps no fp32 master"),
        (["learner.compile=true", "learner.zero_stage=3"], "ZeRO-3's hooks cannot be compiled"),
        (["checkpoint.every=50", "teacher.sync_every=20"], "50 is no multiple of teacher.sync_every=20"),
        (["rollout.temperature=2.5"], "less than or equal to 2"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_the_reason(recipe, overrides, message):
    with pytest.raises(ConfigError) as e:
        load_config(recipe, overrides)
    assert message in str(e.value)


def test_sampling_among_more_ids_than_the_loss_takes_is_no_mistake(recipe):
    load_config(recipe, [*STUDENTS_TOP_5, "rollout.top_k=5"])
    load_config(recipe, [*STUDENTS_TOP_5, "rollout.top_k=4", "method=sft"])


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"),
    [(1, 80, 3), (1, 96, 3), (1, 97, 4), (2, 80, 5), (0.5, 128, 2), (0.1, 10, 1), (1.1, 320, 11)],
)
def test_every_row_of_the_last_pass_is_seen(recipe, epochs, rows, steps):
    assert load_config(recipe, [f"epochs={epochs}"]).num_steps(rows) == steps


def test_demonstrations_are_imitated_from_their_first_token_on(recipe):
    skipped = [
        load_config(recipe, ["loss.skip_first_tokens=3", f"method={m}"]).skipped_tokens for m in ("sdft", "sft", "dft")
    ]
    assert skipped == [3, 0, 0]

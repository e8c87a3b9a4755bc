"""What an exported model says about itself."""

import yaml
from test_rundir import claim, config_in

from sdft_dist.evaluate import Judged
from sdft_dist.model_card import model_card


def card(tmp_path, weights="student", step=20, **sections):
    config = config_in(tmp_path / "run", **sections)
    run, _ = claim(config)
    run.note_evaluation(20, {"new": [Judged("a", "a", True)] * 3 + [Judged("b", "a", False)], "old": []})
    return model_card(run, config, {"step": step, "fingerprint": {"data (token ids)": "f00d"}}, weights)


def test_a_card_has_scores_with_intervals_data_and_settings(tmp_path):
    text = card(tmp_path, model={"path": "Qwen/Qwen3-4B", "revision": "abc"}, method="sft")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "Qwen/Qwen3-4B"
    assert "at revision `abc`" in body
    assert "supervised fine-tuning" in body
    assert "after 20 optimizer steps" in body
    assert "| new | 75.0% | 30.1 – 95.4% | 4 |" in body  # Wilson's interval of 3 in 4
    assert "`f00d`" in body
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert settings["optim"]["learning_rate"] > 0


def test_a_card_claims_no_scores_of_other_weights(tmp_path):
    assert "None were measured" in card(tmp_path / "ema", weights="ema")
    assert "None were measured" in card(tmp_path / "step", step=21)


def test_a_local_base_is_no_hub_id(tmp_path):
    assert "base_model" not in card(tmp_path, model={"path": "/models/base"})


def test_a_card_tells_how_to_prompt_as_in_training(tmp_path):
    told = "`vllm serve --default-chat-template-kwargs '{\"enable_thinking\": false}'`"
    prompt = {"chat_template_kwargs": {"enable_thinking": False}}
    assert told in card(tmp_path / "one", prompt=prompt)
    assert "vllm serve" not in card(tmp_path / "other")

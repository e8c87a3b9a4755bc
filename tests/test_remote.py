"""What a wait tells of who did not answer."""

import pytest

from sdft_dist.remote import Events


@pytest.mark.parametrize(
    ("refs", "told"),
    [
        (["a"], "start: no answer in 0 s; where"),
        (["a", "b", "c"], "start: no answer in 0 s from 0, 1, 2 of 0 … 2; where"),
    ],
)
def test_who_does_not_answer_is_named_where_there_are_several(monkeypatch, refs, told):
    monkeypatch.setattr(Events, "_next", lambda self, refs, deadline: None)
    with pytest.raises(TimeoutError) as e:
        Events().wait_all(refs, timeout_s=0, what="start")
    assert str(e.value).startswith(told)

"""An engine outside that fails, dies, comes back, or is not the one that a run can have."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from data.tokenizer_files import load_tokenizer
from data.tokenizer_training import bytes_tokenizer
from errors import UserError
from rl.config import ReinforceConfig
from rl.servers.connect import connect
from rl.servers.server import pause
from tests.rl.served import (
    SAMPLING,
    assert_same,
    connected,
    engine_of,
    expected_by,
    prompts_of,
    sampled,
)
from tests.tiny_checkpoint import MODEL

PASSING = ("503", "429", "500", "reset", "garbage", "cut", "hang")


@pytest.mark.parametrize("api", ["vllm", "sglang"])
@pytest.mark.parametrize("fault", PASSING)
def test_what_fails_is_asked_again(api, fault, serve, served_setup, policy, expected, tmp_path):
    """And comes to what it would have come to. Where the server may have died in between it is
    given its weights again.
    """
    served = serve(api)
    server = connected(
        served, served_setup, tmp_path, server_timeout=0.75 if fault == "hang" else 20.0
    )
    engine = engine_of(server)
    with engine.loaded(policy, version=7):
        served.faults.extend(["", fault, ""])
        assert_same(sampled(engine, prompts_of()), expected)
    assert not served.faults
    assert len(served.loaded) == (1 if fault == "429" else 2)


def test_a_server_that_is_back_has_the_weights_that_it_was_given(
    serve, served_setup, policy, expected, tmp_path, capsys
):
    """It dies in the midst and begins with its first ones, and nobody samples with those."""
    served = serve()
    server = connected(served, served_setup, tmp_path, server_retries=12)
    engine = engine_of(server, requests=3)
    with engine.loaded(policy, version=7):
        served.faults.extend(["", "", "die and come back"])
        assert_same(sampled(engine, prompts_of()), expected)
    assert len(served.loaded) >= 2 and set(served.loaded) == {
        str(tmp_path / "served" / server.version)
    }
    assert "; asks again in 0.01 s" in capsys.readouterr().out


def test_a_server_that_restarts_when_idle_is_seen(serve, served_setup, policy, expected, tmp_path):
    served = serve()
    engine = engine_of(connected(served, served_setup, tmp_path))
    engine.load(policy, version=7)
    served.stop()
    served.start()
    with engine.loaded(policy, version=7):
        assert_same(sampled(engine, prompts_of()), expected)
    assert len(served.loaded) == 2


def test_sglang_that_says_other_weights_is_given_its_own(
    serve, served_setup, policy, expected, tmp_path
):
    served = serve("sglang")
    engine = engine_of(connected(served, served_setup, tmp_path))
    with engine.loaded(policy, version=7):
        served.faults.append("other weights")
        assert_same(sampled(engine, prompts_of()), expected)
    assert len(served.loaded) == 2


def test_a_server_that_is_not_there_yet_is_waited_for(serve, served_setup, tmp_path):
    served = serve()
    served.stop()
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"http://127.*: Connection refused, 3 times in a row"
    ) as no:
        connected(served, served_setup, tmp_path, server_retries=2)
    assert "\n" not in str(no.value) and time.monotonic() - began < 2
    later = threading.Timer(0.2, served.start)
    later.start()
    connected(served, served_setup, tmp_path, server_retries=12)
    later.join()
    assert [pause(n) for n in (1, 2, 3, 20)] == [0.01, 0.02, 0.04, 60.0]


def test_a_server_that_dies_for_good_is_one_line(serve, served_setup, policy, tmp_path):
    served = serve()
    engine = engine_of(connected(served, served_setup, tmp_path, server_retries=3))
    with (
        pytest.raises(UserError, match=r"4 times in a row .*goes on from its last checkpoint"),
        engine.loaded(policy),
    ):
        served.faults.extend(["", "die"])
        list(engine.run(prompts_of()))
    assert not engine.busy


def test_what_always_fails_ends(serve, served_setup, policy, tmp_path):
    """Though others succeed in between."""
    served = serve()
    server = connected(served, served_setup, tmp_path, server_retries=2)
    engine = engine_of(server, requests=1)
    with pytest.raises(UserError, match="HTTP 503, not now, 3 times"), engine.loaded(policy):
        served.faults.extend(["", "503", "503", "503"])
        list(engine.run(prompts_of()))


REFUSED = {
    "400": "is refused with HTTP 400, not now",
    "no logprobs": "an answer without log-probs",
    "fewer ids": r"a completion of \d+ tokens has \d+ log-probs",
    "other id": "a completion has id 100000, and there are 288",
    "other stop": r"ended \(stop\) with id \d+ after 1 tokens, 11 before its end",
    "nan": "a log-prob that is no number",
}


@pytest.mark.parametrize("api", ["vllm", "sglang"])
@pytest.mark.parametrize("fault", REFUSED)
def test_an_answer_that_cannot_be_is_one_line(api, fault, serve, served_setup, policy, tmp_path):
    if (api, fault) == ("sglang", "other id"):
        pytest.skip("its ids come twice, and are compared")
    served = serve(api)
    engine = engine_of(connected(served, served_setup, tmp_path))
    with pytest.raises(UserError, match=REFUSED[fault]) as error, engine.loaded(policy):
        served.faults.append(fault)
        list(engine.run(prompts_of(1, stops=())))
    assert str(error.value).startswith(served.url) and "\n" not in str(error.value)


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_weights_that_are_not_loaded_are_one_line(api, serve, served_setup, policy, tmp_path):
    served = serve(api)
    engine = engine_of(connected(served, served_setup, tmp_path))
    served.model = dataclasses.replace(MODEL, num_hidden_layers=3)
    with pytest.raises(UserError, match=f"^{served.url}: .*(is missing|calls for)"):
        engine.load(policy)
    assert len(served.loaded) == 1


def test_another_tokenizer_is_one_line(serve, served_setup, tmp_path):
    served = serve()
    served.tokenizer = bytes_tokenizer()
    with pytest.raises(UserError, match=r": its tokenizer is another than this run's: .* there"):
        connected(served, served_setup, tmp_path)


def test_a_token_more_is_another_tokenizer(serve, served_setup, tmp_path, served_origin):
    """Texts are the same, and the mark that ends a turn has another id."""
    served = serve()
    written = (served_origin / "tokenizer.json").read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(
        written.replace("<|end|>", "<|x|>").replace("<|user|>", "<|end|>")
    )
    served.tokenizer = load_tokenizer(other)
    with pytest.raises(UserError, match=r"'<\|end\|>' is \[258\] there at token 0, \[257\] here"):
        connected(served, served_setup, tmp_path)


def test_log_probs_from_before_the_temperature_are_refused(
    serve, served_setup, policy, served_origin, tmp_path
):
    sampling = dataclasses.replace(SAMPLING, temperature=0.7)
    served = serve(temperature_told=False)
    with pytest.raises(UserError, match=r"start it with --logprobs-mode processed_logprobs"):
        connected(served, served_setup, tmp_path, sampling)
    served.temperature_told = True
    engine = engine_of(connected(served, served_setup, tmp_path, sampling), sampling)
    with engine.loaded(policy, version=7):
        assert_same(sampled(engine, prompts_of()), expected_by(served_origin, 1.1, 0.7))


def test_sequences_that_are_too_short_are_refused(serve, served_setup, tmp_path):
    with pytest.raises(UserError, match=r"sequences of 30 tokens, .* are 36"):
        connected(serve(longest=30), served_setup, tmp_path)


def test_another_server_is_one_line(serve, served_setup, tmp_path):
    with pytest.raises(UserError, match="POST /generate is refused with HTTP 404"):
        connected(serve("vllm"), served_setup, tmp_path, server_api="sglang")


FIELDS = [
    ({"top_k": 5}, {}, "sampling.top_k = 5: its log-probs are over the whole vocabulary"),
    ({"top_p": 0.9}, {}, "sampling.top_p = 0.9: "),
    ({"drafts": 1}, {}, "sampling.drafts = 1: the server drafts by options of its own"),
    ({"attention_top_p": 0.5}, {}, "sampling.attention_top_p = 0.5: "),
    ({}, {"keep_routing": True}, "reinforce.keep_routing = True: a server records no experts"),
    ({}, {"sampler_devices": 1}, "reinforce.sampler_devices = 1: a server samples"),
    ({}, {"unfinished": "kept"}, "reinforce.unfinished = 'kept'"),
]


@pytest.mark.parametrize(("sampling", "reinforce", "line"), FIELDS)
def test_what_no_server_does_is_refused(sampling, reinforce, line, served_setup, tmp_path):
    """Before anything is asked."""
    asked = dataclasses.replace(SAMPLING, server="http://127.0.0.1:1", **sampling)
    with pytest.raises(UserError, match=line):
        connect(
            served_setup, asked, ReinforceConfig(**reinforce), tmp_path, "checkpoint", corrects=True
        )


def test_forbidden_ids_and_grammars_are_refused(serve, served_setup, tmp_path):
    engine = engine_of(connected(serve(), served_setup, tmp_path))
    for changes, line in (
        ({"forbidden": (5,)}, "a prompt forbids ids"),
        ({"allowed": lambda ids: np.ones(288, bool)}, "which ids may follow"),
        ({"max_new_tokens": 99}, "a prompt asks for 99 new tokens"),
    ):
        with pytest.raises(UserError, match=line):
            engine.submit(prompts_of(1, **changes)[0])

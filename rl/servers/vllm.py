"""vLLM's words: /v1/completions with ids, and the endpoints of its development mode for weights.

As vLLM 0.32.0 has them. VLLM_SERVER_DEV_MODE=1 gives it /collective_rpc, by which its workers'
`reload_weights` reads a checkpoint from a directory, /reset_prefix_cache, /abort_requests,
/update_weight_version and /weight_info.
"""

from typing import Any

from errors import UserError
from rl.servers.api import Answer, Wanted
from rl.servers.http import Ask, Refused, Unanswered

NEEDS = "start the server with VLLM_SERVER_DEV_MODE=1, which has the calls that reload weights"


class VLLM:
    """A vLLM server, see `rl.servers.api.API`."""

    name = "vLLM"
    logprobs_hint = "--logprobs-mode processed_logprobs"

    def request(self, model: str, wanted: Wanted, likeliest: int = 0) -> tuple[str, dict[str, Any]]:
        """Returns a request for a completion.

        What else could shape the distribution is said too: where a request says nothing, vLLM takes
        what the checkpoint's generation_config.json has.
        """
        return "/v1/completions", {
            "model": model,
            "prompt": list(map(int, wanted.tokens)),
            "max_tokens": wanted.max_new_tokens,
            "temperature": wanted.temperature,
            "seed": wanted.seed,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # Of `stops` alone: a stop id of the checkpoint's that is none of ours ends nothing.
            "ignore_eos": True,
            "stop_token_ids": list(wanted.stops),
            "logprobs": likeliest,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
        }

    def answer(self, body: Any) -> Answer:
        """Returns what was answered."""
        try:
            (choice,) = body["choices"]
            tokens, logprobs = choice.get("token_ids"), choice.get("logprobs")
            ended = str(choice["finish_reason"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError("an answer without a completion, which is not vLLM's") from None
        if tokens is None:
            raise UserError("an answer without token ids: vLLM has them from 0.10.2 on")
        if not tokens:
            return Answer.of([], [], ended)
        try:
            found = Answer.of(tokens, logprobs["token_logprobs"], ended)
            first = (logprobs.get("top_logprobs") or [None])[0] or {}
            named = {name.removeprefix("token_id:"): value for name, value in first.items()}
            found.likeliest.update({int(name): float(value) for name, value in named.items()})
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError("an answer without log-probs: nothing can be learnt from it") from None
        return found

    def reload(self, ask: Ask, directory: str, version: str) -> None:
        """Reloads weights; vLLM does so between two steps of its own."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": directory}}
        try:
            ask("POST", "/collective_rpc", call)
        except Refused as error:
            raise error if error.status != 404 else UserError(f"{error}; {NEEDS}") from None
        emptied = ask("POST", "/reset_prefix_cache", None)
        if isinstance(emptied, dict) and not emptied.get("success", True):
            raise Unanswered("its cache of prefixes is in use and not emptied", gone=False)
        _known(ask, "POST", "/update_weight_version", {"new_version": version})

    def version(self, ask: Ask) -> str | None:
        """Returns the label of the weights."""
        found = _known(ask, "GET", "/weight_info", None)
        return found.get("weight_version") if isinstance(found, dict) else None

    def abort(self, ask: Ask) -> None:
        """Ends all completions."""
        try:
            ask("POST", "/abort_requests", {})
        except Refused as error:
            raise error if error.status != 404 else UserError(f"{error}; {NEEDS}") from None


def _known(ask: Ask, method: str, path: str, body: Any) -> Any:
    """Returns an answer; None from a server that is too old to have such a path."""
    try:
        return ask(method, path, body)
    except Refused as error:
        if error.status != 404:
            raise
        return None

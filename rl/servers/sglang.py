"""SGLang's words: /generate with ids, and /update_weights_from_disk.

As SGLang 0.5.23 has them.
"""

from typing import Any

from errors import UserError
from rl.servers.api import Answer, Wanted
from rl.servers.http import Ask


class SGLang:
    """An SGLang server, see `rl.servers.api.API`."""

    name = "SGLang"
    logprobs_hint = "SGLANG_RETURN_ORIGINAL_LOGPROB unset"

    def request(self, model: str, wanted: Wanted, likeliest: int = 0) -> tuple[str, dict[str, Any]]:
        """Returns a request for a completion; SGLang serves one model, whose name it does not ask.

        Its `ignore_eos` ignores stop ids too, so that those of the checkpoint count beside `stops`.
        The seed counts where the server runs with --enable-deterministic-inference.
        """
        sampling = {
            "max_new_tokens": wanted.max_new_tokens,
            "temperature": wanted.temperature,
            "sampling_seed": wanted.seed,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(wanted.stops),
            "skip_special_tokens": False,
        }
        return "/generate", {
            "input_ids": list(map(int, wanted.tokens)),
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": likeliest,
            "stream": False,
        }

    def answer(self, body: Any) -> Answer:
        """Returns what was answered."""
        try:
            told = body["meta_info"]
            ended, version = str(told["finish_reason"]["type"]), told.get("weight_version")
            entries = told.get("output_token_logprobs")
        except (KeyError, TypeError, AttributeError):
            raise UserError("an answer without a completion, which is not SGLang's") from None
        if entries is None:
            if ended == "abort":  # before its first token
                return Answer.of([], [], ended, version)
            raise UserError("an answer without log-probs: nothing can be learnt from it")
        try:
            ids, logprobs = [entry[1] for entry in entries], [entry[0] for entry in entries]
            told_ids = body.get("output_ids")
            found = Answer.of(ids if told_ids is None else told_ids, logprobs, ended, version)
            first = (told.get("output_top_logprobs") or [None])[0] or []
            found.likeliest.update({int(entry[1]): float(entry[0]) for entry in first})
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError("an answer whose log-probs are not SGLang's") from None
        if found.tokens.tolist() != list(ids):
            raise UserError("an answer whose ids are not those that its log-probs are of")
        return found

    def reload(self, ask: Ask, directory: str, version: str) -> None:
        """Reloads weights, for which SGLang waits until no completion is under way."""
        call = {"model_path": directory, "weight_version": version, "flush_cache": True}
        found = ask("POST", "/update_weights_from_disk", call)
        if not (isinstance(found, dict) and found.get("success") is True):
            said = found.get("message") if isinstance(found, dict) else found
            raise UserError(f"the weights in {directory} are not loaded: {said}")

    def version(self, ask: Ask) -> str | None:
        """Returns the label of the weights."""
        found = ask("GET", "/model_info", None)
        return found.get("weight_version") if isinstance(found, dict) else None

    def abort(self, ask: Ask) -> None:
        """Ends all completions."""
        ask("POST", "/abort_request", {"abort_all": True})

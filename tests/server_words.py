"""The words of vLLM 0.32.0 and SGLang 0.5.23, as the server of tests/model_server.py has them."""

from typing import Any

from errors import UserError
from rl.trajectory import STOP, UNFINISHED, Trajectory


def told_vllm(body: dict[str, Any]) -> dict[str, Any]:
    assert body["ignore_eos"] and body["return_token_ids"] and body["model"] == "served"
    assert (body["top_p"], body["top_k"], body["min_p"]) == (1.0, 0, 0.0)
    return {
        "tokens": body["prompt"],
        "most": body["max_tokens"],
        "stops": body["stop_token_ids"],
        "temperature": body["temperature"],
        "seed": body["seed"],
        "likeliest": body["logprobs"],
    }


def told_sglang(body: dict[str, Any]) -> dict[str, Any]:
    sampling = body["sampling_params"]
    assert body["return_logprob"] and "ignore_eos" not in sampling
    assert (sampling["top_p"], sampling["top_k"], sampling["min_p"]) == (1.0, -1, 0.0)
    return {
        "tokens": body["input_ids"],
        "most": sampling["max_new_tokens"],
        "stops": sampling["stop_token_ids"],
        "temperature": sampling["temperature"],
        "seed": sampling["sampling_seed"],
        "likeliest": body["top_logprobs_num"],
    }


def _sampled(trajectory: Trajectory, fault: str) -> tuple[list[int], list[float]]:
    sampled_T = trajectory.sampled_T
    ids = [int(each) for each in trajectory.tokens_T[sampled_T]]
    logprobs = [float(each) for each in trajectory.logprobs_T[sampled_T]]
    if fault == "fewer ids":
        ids = ids[:-1]
    if fault == "other id":
        ids[0] = 100_000
    if fault == "other stop":
        ids, logprobs = ids[:1], logprobs[:1]
    if fault == "nan":
        logprobs[0] = float("nan")
    return ids, logprobs


def _top(owner: Any, told: dict[str, Any]) -> dict[int, float]:
    if not told["likeliest"]:
        return {}
    return owner.likeliest(told["tokens"], told["temperature"], told["likeliest"])


def completion_vllm(
    owner: Any, told: dict[str, Any], trajectory: Trajectory, fault: str
) -> dict[str, Any]:
    ids, logprobs = _sampled(trajectory, fault)
    ended = {STOP: "stop", UNFINISHED: "abort"}.get(trajectory.ended, "length")
    named = {f"token_id:{index}": value for index, value in _top(owner, told).items()}
    choice = {
        "index": 0,
        "text": "",
        "logprobs": {
            "token_logprobs": logprobs,
            "tokens": [f"token_id:{each}" for each in ids],
            "top_logprobs": [named] + [{} for _ in logprobs[1:]],
        },
        "finish_reason": "stop" if fault == "other stop" else ended,
        "token_ids": ids,
    }
    if fault == "no logprobs":
        choice["logprobs"] = None
    if fault == "no ids":
        choice["token_ids"] = None
    return {"object": "text_completion", "model": "served", "choices": [choice]}


def completion_sglang(
    owner: Any, told: dict[str, Any], trajectory: Trajectory, fault: str
) -> dict[str, Any]:
    ids, logprobs = _sampled(trajectory, fault)
    ended = {STOP: "stop", UNFINISHED: "abort"}.get(trajectory.ended, "length")
    own = trajectory.tokens_T[trajectory.sampled_T].tolist()
    entries = [[value, index, None] for value, index in zip(logprobs, own, strict=False)]
    meta = {
        "finish_reason": {"type": "stop" if fault == "other stop" else ended},
        "weight_version": "other" if fault == "other weights" else owner.version,
        "output_token_logprobs": entries,
        "output_top_logprobs": [[[v, i, None] for i, v in _top(owner, told).items()]],
    }
    if fault == "no logprobs":
        del meta["output_token_logprobs"]
    return {"text": "", "output_ids": ids, "meta_info": meta}


def vllm(owner: Any, path: str, body: Any) -> tuple[int, Any]:
    if path == "/collective_rpc":
        assert body["method"] == "reload_weights"
        try:
            owner.reload(body["kwargs"]["weights_path"])
        except UserError as error:
            return 500, {"error": {"message": f"Worker failed with error '{error}'", "code": 500}}
        return 200, {"results": [None]}
    if path == "/reset_prefix_cache":
        return 200, {"success": True}
    if path == "/update_weight_version":
        owner.version = body["new_version"]
        return 200, {"success": True}
    if path == "/abort_requests":
        return _abort(owner), {"status": "aborted"}
    return 404, {"detail": "Not Found"}


def sglang(owner: Any, path: str, body: Any) -> tuple[int, Any]:
    if path == "/update_weights_from_disk":
        assert body["flush_cache"]
        try:
            owner.reload(body["model_path"])
        except UserError as error:
            return 400, {"success": False, "message": str(error), "num_paused_requests": 0}
        owner.version = body["weight_version"]
        return 200, {"success": True, "message": "Succeeded to update model weights."}
    if path == "/abort_request":
        assert body == {"abort_all": True}
        return _abort(owner), None
    return 404, {"detail": "Not Found"}


def _abort(owner: Any) -> int:
    with owner.change:
        owner.aborts += 1
        owner.change.notify_all()
    return 200

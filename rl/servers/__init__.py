"""A vLLM or SGLang server samples in place of the engine of this process.

Token ids go in, token ids and log-probs come out; the policy is handed over as a Hugging Face
checkpoint in a directory that both see. `engine` is what the loop has in place of `rl.engine`,
`server` a server with the weights that it was given, `vllm` and `sglang` what each is asked and
answers, `checks` what must hold before anything is sampled, `export` writes the checkpoints, `http`
makes a request. Nothing is installed for it: requests are the standard library's.
"""

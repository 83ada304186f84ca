"""The commands a person types, each a file, and nothing else.

A command line comes in; a command parses it (experiment/command_line.py), calls what it is for in
experiment/, report/ or plan/, and prints. Each file's docstring is its `--help`. No command imports
another: what two of them share lies below.

`python -m launch.pretrain ...` and `athanor pretrain ...` are the same. Start reading in
pretrain.py.
"""

# name -> what the command does, in the order in which a newcomer meets them
COMMANDS = {
    "quickstart": "run everything once: pretrain, select keys, fine-tune, reinforce, evaluate",
    "pretrain": "pretrain with fill-in-the-middle, or train the sparse indexer",
    "finetune": "fine-tune on conversations, or on pairs of them",
    "reinforce": "reinforcement learning on verifiable tasks",
    "evaluate": "pass@k and cons@k on held-out problems, infilling; compare two runs",
    "fit_scaling": "fit held-out pass rates of runs against their compute",
    "sample": "write on from a prompt, answer in a chat, fill a gap",
    "score": "logits, hidden states, routes and log-probabilities of given tokens or texts",
    "convert": "turn a Hugging Face checkpoint into a workdir, and back",
    "report": "show a run's numbers, curves and samples on one page",
    "sweep": "run every experiment of a config's sweep() and print one table",
    "plan": "tell whether a config fits a TPU topology, and how fast it can be at most",
    "pod": "start a command on every host of a TPU slice, a GKE or a Slurm cluster",
    "algorithms": "print the algorithms of reinforcement, with options and costs",
    "fields": "print the fields of a config",
}

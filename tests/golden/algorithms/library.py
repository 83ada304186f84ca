"""Take single functions and classes out of a library whose package cannot be imported whole.

The source is read from the checkout when the recorder runs; only the definitions named are
executed, without their annotations and without decorators that compile, register or check types.
"""

import ast
import contextlib
import dataclasses
import functools
import types
from argparse import Namespace
from collections import defaultdict
from typing import Any, Optional

import numpy as np
import torch

KEPT = ("staticmethod", "dataclass", "property", "torch.no_grad()")


class Bare(ast.NodeTransformer):
    """Drop annotations of functions and most decorators."""

    def bare(self, node):
        """A function or coroutine without annotations."""
        self.generic_visit(node)
        node.returns = None
        node.decorator_list = [
            one for one in node.decorator_list if ast.unparse(one).startswith(KEPT)
        ]
        return node

    def visit_FunctionDef(self, node):
        """A function."""
        return self.bare(node)

    def visit_AsyncFunctionDef(self, node):
        """A coroutine."""
        return self.bare(node)

    def visit_ClassDef(self, node):
        """A class with the decorators kept."""
        self.generic_visit(node)
        node.decorator_list = [
            one for one in node.decorator_list if ast.unparse(one).startswith(KEPT)
        ]
        return node

    def visit_arg(self, node):
        """A parameter without its annotation."""
        node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        """A field or variable of any type."""
        node.annotation = ast.Name("object", ast.Load())
        return node


def load(path, names, **given):
    """The definitions named in a file, with `given` as what they find beside them."""
    with open(path) as file:
        tree = ast.parse(file.read())
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.setdefault(node.name, node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                found.setdefault(target.id, node)
    body = [
        Bare().visit(node)
        for node in tree.body + [*found.values()]
        if any(found.get(name) is node for name in names)
    ]
    body = list(dict.fromkeys(body))
    module = types.ModuleType("taken")
    module.__dict__.update(
        {
            "torch": torch,
            "np": np,
            "F": torch.nn.functional,
            "nn": torch.nn,
            "Any": Any,
            "Optional": Optional,
            "Namespace": Namespace,
            "defaultdict": defaultdict,
            "dataclass": dataclasses.dataclass,
            "field": dataclasses.field,
            "functools": functools,
            "print": lambda *_, **__: None,
            **given,
        }
    )
    tree = ast.fix_missing_locations(ast.Module(body, []))
    exec(compile(tree, path, "exec"), module.__dict__)
    return module


@contextlib.contextmanager
def double_names():
    """Let torch.float32 and torch.float be float64 where a library names them."""
    single = torch.float32
    torch.float32 = torch.float = torch.float64
    try:
        yield
    finally:
        torch.float32 = torch.float = single

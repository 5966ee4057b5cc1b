"""Arithmetic over named numbers, as a grader's `calculate_output` writes it. Nothing in it is ever run as code.

It has + - * / and ^ (or **) for powers, parentheses, numbers, the names that it is given, and the functions of `FUNCTIONS`.
"""

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping

from saddlepoint.errors import UsageError

LONGEST, DEEPEST = 1000, 50  # characters, and operations within one another
FUNCTIONS: Mapping[str, Callable[..., float]] = {
    "min": lambda *xs: min(xs), "max": lambda *xs: max(xs), "abs": abs, "floor": math.floor, "ceil": math.ceil, "exp": math.exp,
    "sqrt": math.sqrt, "log": lambda x: math.log(x),
}  # fmt: skip
_SEVERAL = {"min", "max"}  # these take one or more numbers, the others one
_BINARY: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: math.pow,
}  # fmt: skip
_UNARY: Mapping[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def parsed(text: str, names: Collection[str]) -> ast.expr:
    """A formula that holds nothing but arithmetic over `names`.

    Raises:
        UsageError: It holds something else, cannot be read, or has more than 1,000 characters.
    """
    if len(text) > LONGEST or not text.isascii():
        raise UsageError(f"the formula must be plain ASCII of at most {LONGEST} characters, not {text[:40]!r} of {len(text)}")
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
        _check(tree, names, DEEPEST)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as wrong:
        if isinstance(wrong, UsageError):
            raise
        raise UsageError(f"the formula {text!r} cannot be read: {wrong}; write arithmetic such as 0.5 * first + 0.5 * second") from None
    return tree


def value(tree: ast.expr, numbers: Mapping[str, float]) -> float:
    """The finite number that a parsed formula comes to.

    Raises:
        ArithmeticError, ValueError: It has none there: a division by zero, the root of a negative number, an overflow.
    """
    found = float(_value(tree, numbers))
    if not math.isfinite(found):
        raise ArithmeticError(f"the formula comes to {found}")
    return found


def _check(node: ast.expr, names: Collection[str], room: int) -> None:
    if not room:
        raise UsageError(f"the formula has more than {DEEPEST} operations within one another; write it in fewer")
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            float(number)  # an integer may be too large for one
        case ast.Name(id=name):
            if name not in names:
                raise UsageError(f"the formula names '{name}'; there are: {', '.join(sorted(names)) or 'no graders'}")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            _check(left, names, room - 1)
            _check(right, names, room - 1)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            _check(operand, names, room - 1)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            if not args or (len(args) > 1 and name not in _SEVERAL):
                raise UsageError(f"{name} takes {'one or more numbers' if name in _SEVERAL else 'one number'}, not {len(args)}")
            for arg in args:
                _check(arg, names, room - 1)
        case _:
            allowed = f"+ - * / ^, parentheses, numbers, the graders' names and {', '.join(FUNCTIONS)}"
            raise UsageError(f"the formula holds {ast.unparse(node)!r}; allowed are {allowed}")


def _value(node: ast.expr, numbers: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name):
            return float(numbers[name])
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_value(left, numbers), _value(right, numbers))
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](_value(operand, numbers))
        case ast.Call(func=ast.Name(id=name), args=args):
            return float(FUNCTIONS[name](*(_value(arg, numbers) for arg in args)))
    raise AssertionError(f"{node} was not checked")

"""Training targets of a rendered conversation: the tokens that the assistant itself sampled."""

from data.chat_template import AssistantSpan
from data.tokenizer import Encoding, Tokenizer
from errors import UserError


def target_tokens(turn: AssistantSpan, encoding: Encoding, tokenizer: Tokenizer) -> range:
    r"""Returns the indices of the tokens that the assistant sampled to write one turn.

    They begin with the turn's first token and end where sampling would have ended. A template may
    render more than that after a turn, such as a line break. The first case that applies decides
    ("|" marks the end of the targets):

        case                                 example             why
        1 a stop token in the turn           4<|im_end|>|\n      sampling ends at the first stop
        2 a stop token right after the turn  4<|user|>|          the next speaker's marker is a
                                                                 stop, which the assistant samples
        3 a special token, then white space  4<|im_end|>|\n      it ends the turn though it is no
                                                                 stop, as for a base model
        4 none of these                      4|                  all of the turn is sampled

    A token whose characters are only partly the turn's is no target: the assistant cannot have
    sampled it.

    Args:
      turn: the characters of the turn.
      encoding: the rendered conversation.
      tokenizer: the tokenizer that encoded it.

    Raises:
      UserError: more than special tokens and white space follows the first stop token in the turn,
        so that the message itself contains one.
    """

    def is_stop(index: int) -> bool:
        """Returns whether sampling ends with this token."""
        return encoding.ids[index] in tokenizer.stops

    def is_special(index: int) -> bool:
        """Returns whether this is a special token, a marker rather than text."""
        return tokenizer.is_special(encoding.ids[index])

    def is_filler(index: int) -> bool:
        """Returns whether this is a special token or white space, so that it says nothing."""
        return is_special(index) or not _text(encoding, index).strip()

    inside = _tokens_inside(turn, encoding)
    if not inside:
        return range(0)
    first, last = inside[0], inside[-1]

    stop = next(filter(is_stop, inside), None)
    if stop is not None:  # case 1
        if not all(map(is_filler, range(stop + 1, last + 1))):
            raise UserError(
                f"message {turn.message} holds {_text(encoding, stop)}, at which sampling stops, "
                "before its end"
            )
        return range(first, stop + 1)

    if last + 1 < len(encoding.ids) and is_stop(last + 1):  # case 2
        return range(first, last + 2)

    special = next(filter(is_special, reversed(inside)), None)
    if special is not None and all(map(is_filler, range(special, last + 1))):  # case 3
        return range(first, special + 1)

    return range(first, last + 1)  # case 4


def _tokens_inside(turn: AssistantSpan, encoding: Encoding) -> list[int]:
    """Returns the indices of the tokens all of whose characters are the turn's."""
    return [
        index
        for index, (start, end) in enumerate(encoding.offsets)
        if turn.start <= start < turn.end and end <= turn.end
    ]


def _text(encoding: Encoding, index: int) -> str:
    """Returns the characters that a token stands for."""
    return encoding.text[slice(*encoding.offsets[index])]

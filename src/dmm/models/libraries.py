"""What the libraries say on their own account, kept from where it would hide what we say."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries() -> None:
    """Leave diffusers and transformers their errors only, for good; call it before anything else imports them."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def quietly() -> Iterator[None]:
    """:func:`quiet_libraries` for the length of a block; afterwards they say what they said before."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    with warnings.catch_warnings():
        quiet_libraries()
        try:
            yield
        finally:
            for library, (verbosity, has_bar) in zip(libraries, before, strict=True):
                library.set_verbosity(verbosity)
                if has_bar:
                    library.enable_progress_bar()

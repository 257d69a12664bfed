"""What the libraries say on their own account, kept from the command line, where it would hide what we say."""

import warnings


def quiet_libraries() -> None:
    """Leave diffusers and transformers their errors only; call it before anything else imports them."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)

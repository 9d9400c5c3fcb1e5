"""``python -m fedlora_app.cli``, where the installed command is not at hand."""

from fedlora_app.cli import main

main()

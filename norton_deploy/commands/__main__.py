"""`python -m norton_deploy.commands COMMAND ...` is `norton COMMAND ...`."""

from norton_deploy.commands import main

main()

"""Fine-tunes the experts, first together, then apart: assigned + router + teacher -> experts/."""

from cli import main
from stages import finetune

if __name__ == "__main__":
    main("finetune", finetune, __doc__)

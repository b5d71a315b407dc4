"""Write the tiny world of shapes: ``python -m instructsam.make_tiny_world``."""

from instructsam.data.tiny_world import main

if __name__ == "__main__":
    main()

// MLX's header of this name gives bfloat the functions that the library has for float. Ours does.
#pragma once

// Nothing is logged from a kernel here.
#pragma once

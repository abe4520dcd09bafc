// Constructors that libstdc++ exports since GCC 9, and that code which the compiler does not inline calls there, such
// as nvcc's: with these a library loads beside GCC 8's libstdc++, which manylinux_2_28 has.
#include <sstream>

template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();

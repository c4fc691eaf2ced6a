// In OpenMP's place where the compiler has none (CMakeLists.txt): its pragmas are not heeded, and one thread does all.
#pragma once

inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }

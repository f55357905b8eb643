// RHEO_CLONES compiles a function for several instruction sets and picks one when the program is loaded,
// for plain loops that the compiler vectorises by itself.
#pragma once

#if defined(RHEO_X86) && defined(__gnu_linux__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define RHEO_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define RHEO_CLONES
#endif

// Choice of the kernel table at run time.
#include <cstring>

#include "kernels.h"

namespace xds {
namespace {

bool is(const char* a, const char* b) { return std::strcmp(a, b) == 0; }

#if defined(XDS_HAVE_AVX2)
bool machine_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

#if defined(XDS_HAVE_AVX512)
bool machine_has_avx512() {
  return machine_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

}  // namespace

const Kernels* find_kernels(const char* name) {
#if defined(XDS_HAVE_AVX512)
  if ((is(name, "avx512") || is(name, "auto")) && machine_has_avx512()) return &avx512_kernels();
#endif
#if defined(XDS_HAVE_AVX2)
  if ((is(name, "avx2") || is(name, "auto")) && machine_has_avx2()) return &avx2_kernels();
#endif
  return is(name, "portable") || is(name, "auto") ? &portable_kernels() : nullptr;
}

}  // namespace xds

// Choice of the kernel table at run time.
#include <cstring>

#if defined(XDS_HAVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#if defined(XDS_HAVE_AMX)
// Linux gives a process the tile registers when it asks for them.
bool may_use_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

bool machine_has_amx() {
  return machine_has_avx512() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
         may_use_tiles();
}
#endif

}  // namespace

const Kernels* find_kernels(const char* name) {
#if defined(XDS_HAVE_AMX)
  if ((is(name, "amx") || is(name, "auto")) && machine_has_amx()) return &amx_kernels();
#endif
#if defined(XDS_HAVE_AVX512)
  if ((is(name, "avx512") || is(name, "auto")) && machine_has_avx512()) return &avx512_kernels();
#endif
#if defined(XDS_HAVE_AVX2)
  if ((is(name, "avx2") || is(name, "auto")) && machine_has_avx2()) return &avx2_kernels();
#endif
  return is(name, "portable") || is(name, "auto") ? &portable_kernels() : nullptr;
}

}  // namespace xds

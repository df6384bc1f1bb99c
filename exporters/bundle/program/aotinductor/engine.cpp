// Opens libdecode_engine.so, which links torch. A host without torch gets an error instead of the loader's.

#include <dlfcn.h>

#include "decode.h"

namespace {

std::string own_folder() {
  Dl_info info{};
  const bool found = dladdr(reinterpret_cast<void*>(&optc::open_decoder), &info) != 0 && info.dli_fname;
  const std::string path = found ? info.dli_fname : "";
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

}  // namespace

std::unique_ptr<optc::Decoder> optc::open_decoder(const Setup& setup) {
  const std::string path = own_folder() + "/libdecode_engine.so";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (!library) {
    const char* reason = dlerror();
    throw Failure(kNoRuntime, "cannot load the engine: " + std::string(reason ? reason : path) +
                                  "\nput torch's libraries into lib/ beside it, or their folder into LD_LIBRARY_PATH");
  }
  using Open = Decoder* (*)(const Setup*);
  const auto open = reinterpret_cast<Open>(dlsym(library, "optc_open_decoder"));
  if (!open) throw Failure(kNoRuntime, path + " is not the engine of this program");
  return std::unique_ptr<Decoder>(open(&setup));
}

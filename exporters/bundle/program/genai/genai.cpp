// A sequence in onnxruntime-genai, over its C API.
//
// Both libraries are opened at run time: their packages for Python carry the libraries but no headers, and a host
// without them gets an error instead of the loader's. Where ort_genai_c.h is found (GENAI_INCLUDE_DIR), the types
// below are checked against it.

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#include "decode.h"
#include "model.h"

#if __has_include(<ort_genai_c.h>)
#include <ort_genai_c.h>
#define OPTC_HAS_GENAI_HEADER 1
#include <type_traits>
#else
extern "C" {
struct OgaResult;
struct OgaModel;
struct OgaConfig;
struct OgaGeneratorParams;
struct OgaGenerator;
struct OgaTensor;
}
#endif

namespace {

using optc::Failure;

// Name, result, parameters: ort_genai_c.h of 0.18.
#define OPTC_GENAI_FUNCTIONS(F)                                                                  \
  F(OgaResultGetError, const char*, (const OgaResult*))                                          \
  F(OgaDestroyResult, void, (OgaResult*))                                                        \
  F(OgaCreateConfig, OgaResult*, (const char*, OgaConfig**))                                     \
  F(OgaConfigOverlay, OgaResult*, (OgaConfig*, const char*))                                     \
  F(OgaDestroyConfig, void, (OgaConfig*))                                                        \
  F(OgaCreateModelFromConfig, OgaResult*, (const OgaConfig*, OgaModel**))                        \
  F(OgaDestroyModel, void, (OgaModel*))                                                          \
  F(OgaCreateGeneratorParams, OgaResult*, (const OgaModel*, OgaGeneratorParams**))               \
  F(OgaGeneratorParamsSetSearchNumber, OgaResult*, (OgaGeneratorParams*, const char*, double))   \
  F(OgaDestroyGeneratorParams, void, (OgaGeneratorParams*))                                      \
  F(OgaCreateGenerator, OgaResult*, (const OgaModel*, const OgaGeneratorParams*, OgaGenerator**)) \
  F(OgaDestroyGenerator, void, (OgaGenerator*))                                                  \
  F(OgaGenerator_AppendTokens, OgaResult*, (OgaGenerator*, const std::int32_t*, std::size_t))    \
  F(OgaGenerator_GetLogits, OgaResult*, (OgaGenerator*, OgaTensor**))                            \
  F(OgaTensorGetShapeRank, OgaResult*, (OgaTensor*, std::size_t*))                               \
  F(OgaTensorGetShape, OgaResult*, (OgaTensor*, std::int64_t*, std::size_t))                     \
  F(OgaTensorGetData, OgaResult*, (OgaTensor*, void**))                                          \
  F(OgaDestroyTensor, void, (OgaTensor*))

#ifdef OPTC_HAS_GENAI_HEADER
#define OPTC_CHECK(name, result, parameters) \
  static_assert(std::is_convertible_v<decltype(&::name), result(*) parameters>, #name);
OPTC_GENAI_FUNCTIONS(OPTC_CHECK)
#endif

struct Api {
#define OPTC_MEMBER(name, result, parameters) result(*name) parameters = nullptr;
  OPTC_GENAI_FUNCTIONS(OPTC_MEMBER)
#undef OPTC_MEMBER
};

// Open the first of: the bundle's lib/, the file given to CMake, wherever the system looks.
void* open_library(const std::string& folder, const std::string& configured, const std::string& name) {
  std::string tried;
  for (const std::string& place : {folder + "/lib/" + name, configured, name}) {
    if (void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_GLOBAL)) return library;
    const char* reason = dlerror();
    tried += "\n  " + std::string(reason ? reason : place.c_str());
  }
  throw Failure(optc::kNoRuntime, "cannot load " + name + tried +
                                      "\nput it into lib/ of the bundle, or its folder into LD_LIBRARY_PATH");
}

Api load_api(const std::string& folder) {
  open_library(folder, OPTC_ONNXRUNTIME_LIBRARY, "libonnxruntime.so.1");  // genai finds it by this name, once loaded
  void* library = open_library(folder, OPTC_GENAI_LIBRARY, "libonnxruntime-genai.so");
  Api api;
#define OPTC_LOAD(name, result, parameters)                                                            \
  api.name = reinterpret_cast<result(*) parameters>(dlsym(library, #name));                            \
  if (!api.name) throw Failure(optc::kNoRuntime, "libonnxruntime-genai.so has no function " #name \
                                                 ": use version 0.18 or later");
  OPTC_GENAI_FUNCTIONS(OPTC_LOAD)
#undef OPTC_LOAD
  return api;
}

class GenaiDecoder final : public optc::Decoder {
 public:
  explicit GenaiDecoder(const optc::Setup& setup) : api_(load_api(setup.folder)) {
    try {
      check(optc::kDamaged, "genai_config.json", api_.OgaCreateConfig(setup.folder.c_str(), &config_));
      if (setup.threads > 0) {
        const std::string count = std::to_string(setup.threads);
        const std::string text =
            R"({"model": {"decoder": {"session_options": {"intra_op_num_threads": )" + count + "}}}}";
        check(optc::kOther, "setting the threads", api_.OgaConfigOverlay(config_, text.c_str()));
      }
      check(optc::kNoRuntime, "loading the model", api_.OgaCreateModelFromConfig(config_, &model_));
      check(optc::kOther, "making a generator", api_.OgaCreateGeneratorParams(model_, &params_));
      check(optc::kOther, "making a generator",
            api_.OgaGeneratorParamsSetSearchNumber(params_, "max_length", static_cast<double>(setup.capacity)));
      check(optc::kNoMemory, "making a generator", api_.OgaCreateGenerator(model_, params_, &generator_));
    } catch (...) {
      close();
      throw;
    }
  }
  ~GenaiDecoder() override { close(); }
  GenaiDecoder(const GenaiDecoder&) = delete;
  GenaiDecoder& operator=(const GenaiDecoder&) = delete;

  std::int64_t advance(const optc::Tokens& tokens) override {
    const std::vector<std::int32_t> ids(tokens.begin(), tokens.end());
    check(optc::kOther, "running the model", api_.OgaGenerator_AppendTokens(generator_, ids.data(), ids.size()));
    OgaTensor* logits = nullptr;
    check(optc::kOther, "reading the logits", api_.OgaGenerator_GetLogits(generator_, &logits));
    const std::unique_ptr<OgaTensor, void (*)(OgaTensor*)> owner(logits, api_.OgaDestroyTensor);
    return likeliest(logits);
  }

 private:
  // Logits are float32 [1, n, V]; the last row counts.
  std::int64_t likeliest(OgaTensor* logits) {
    std::size_t rank = 0;
    void* data = nullptr;
    check(optc::kOther, "reading the logits", api_.OgaTensorGetShapeRank(logits, &rank));
    std::vector<std::int64_t> shape(rank);
    check(optc::kOther, "reading the logits", api_.OgaTensorGetShape(logits, shape.data(), rank));
    check(optc::kOther, "reading the logits", api_.OgaTensorGetData(logits, &data));
    if (rank != 3 || shape[0] != 1 || shape[1] < 1 || shape[2] != optc::kVocabSize)
      throw Failure(optc::kDamaged, "the logits are not [1, n, " + std::to_string(optc::kVocabSize) + "]");
    const float* row = static_cast<const float*>(data) + (shape[1] - 1) * shape[2];
    std::int64_t best = 0;
    for (std::int64_t i = 1; i < shape[2]; ++i)
      if (row[i] > row[best]) best = i;
    return best;
  }

  void check(optc::Code code, const std::string& what, OgaResult* result) {
    if (!result) return;
    const std::string reason = api_.OgaResultGetError(result);
    api_.OgaDestroyResult(result);
    throw Failure(code, what + ": " + reason);
  }

  void close() {
    if (generator_) api_.OgaDestroyGenerator(generator_);
    if (params_) api_.OgaDestroyGeneratorParams(params_);
    if (model_) api_.OgaDestroyModel(model_);
    if (config_) api_.OgaDestroyConfig(config_);
  }

  Api api_;
  OgaConfig* config_ = nullptr;
  OgaModel* model_ = nullptr;
  OgaGeneratorParams* params_ = nullptr;
  OgaGenerator* generator_ = nullptr;
};

}  // namespace

std::unique_ptr<optc::Decoder> optc::open_decoder(const Setup& setup) {
  return std::make_unique<GenaiDecoder>(setup);
}

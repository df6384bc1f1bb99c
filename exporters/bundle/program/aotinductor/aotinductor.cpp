// A sequence in an AOTInductor package: weights are read into memory and lent to it, KV caches are written in place.
//
// The package checks neither that its weights are there nor what it is given, and a mistake is a crash. So the
// weights come first, and everything that is passed is made here from the sizes in model.h.

#include <dlfcn.h>
#include <sys/stat.h>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include <fstream>
#include <set>
#include <unordered_map>

#include "decode.h"
#include "model.h"

namespace {

using at::Tensor;
using optc::Failure;

at::ScalarType scalar_type(optc::Type type) {
  switch (type) {
    case optc::kFloat32: return at::kFloat;
    case optc::kFloat16: return at::kHalf;
    case optc::kBFloat16: return at::kBFloat16;
    case optc::kFloat64: return at::kDouble;
    case optc::kInt64: return at::kLong;
    case optc::kInt32: return at::kInt;
    case optc::kInt16: return at::kShort;
    case optc::kInt8: return at::kChar;
    case optc::kUInt8: return at::kByte;
    case optc::kBool: return at::kBool;
  }
  throw Failure(optc::kDamaged, "model.h names an unknown type");
}

void check_size(const std::string& path, std::int64_t wanted) {
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) throw Failure(optc::kDamaged, "cannot read " + path);
  if (info.st_size != wanted)
    throw Failure(optc::kDamaged, path + " has " + std::to_string(info.st_size) + " bytes, not " +
                                      std::to_string(wanted) + ": it is not this program's, or damaged");
}

void check_torch() {
  const std::string version = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
  if (version != optc::kTorchVersion)
    throw Failure(optc::kNoRuntime, "the model was compiled for torch " + std::string(optc::kTorchVersion) +
                                        ", the program was built with " + version);
}

using Weights = std::unordered_map<std::string, Tensor>;

Weights read_weights(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  Weights weights;
  for (const optc::Weight& item : optc::kWeights) {
    Tensor tensor = at::empty(at::IntArrayRef(item.shape, static_cast<std::size_t>(item.rank)),
                              at::TensorOptions().dtype(scalar_type(item.type)));
    file.seekg(item.offset);
    file.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
    if (!file) throw Failure(optc::kDamaged, path + ": cannot read " + item.name);
    weights.emplace(item.name, std::move(tensor));
  }
  return weights;
}

std::string first_line(const char* text) {
  const std::string all = text;
  return all.substr(0, all.find('\n'));
}

class PackageDecoder final : public optc::Decoder {
 public:
  explicit PackageDecoder(const optc::Setup& setup) : capacity_(setup.capacity) {
    check_torch();
    if (setup.threads > 0) at::set_num_threads(setup.threads);
    const std::string package = setup.folder + "/" + optc::kEngineFile;
    const std::string weights = setup.folder + "/" + optc::kWeightsFile;
    check_size(package, optc::kEngineBytes);
    check_size(weights, optc::kWeightsBytes);
    load_library(setup.folder);
    weights_ = read_weights(weights);
    try {
      loader_ = std::make_unique<torch::inductor::AOTIModelPackageLoader>(package);
    } catch (const c10::Error& error) {
      throw Failure(optc::kNoRuntime, package + " cannot be loaded: " + first_line(error.what_without_backtrace()));
    }
    lend_weights(package);
    make_caches();
  }

  std::int64_t advance(const optc::Tokens& tokens) override {
    const auto count = static_cast<std::int64_t>(tokens.size());
    if (count < 1 || held_ + count > capacity_)
      throw Failure(optc::kBadInput, std::to_string(held_ + count) + " tokens do not fit the capacity of " +
                                         std::to_string(capacity_));
    std::vector<Tensor> inputs = optc::kPaged ? paged_inputs(tokens) : linear_inputs(tokens);
    inputs.insert(inputs.end(), caches_.begin(), caches_.end());
    std::vector<Tensor> outputs;
    try {
      outputs = loader_->run(inputs);
    } catch (const c10::Error& error) {
      const std::string reason = first_line(error.what_without_backtrace());
      const bool memory = reason.find("can't allocate memory") != std::string::npos;
      throw Failure(memory ? optc::kNoMemory : optc::kOther, "running the model: " + reason);
    }
    held_ += count;
    // Logits are [1, S, V], or [S, V] when paged; the last row counts.
    const Tensor logits = outputs.at(0).reshape({-1, outputs.at(0).size(-1)});
    if (logits.size(0) != count || logits.size(1) != optc::kVocabSize)
      throw Failure(optc::kDamaged, "the model's logits have another shape than expected");
    return logits.select(0, count - 1).argmax().item<std::int64_t>();
  }

 private:
  void load_library(const std::string& folder) {
    if (optc::kLibraryFile[0] == '\0') return;
    const std::string path = folder + "/" + optc::kLibraryFile;
    if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) return;
    const char* reason = dlerror();
    throw Failure(optc::kNoRuntime, "cannot load the op library: " + std::string(reason ? reason : path));
  }

  // The package must not run without them: it would follow null pointers.
  void lend_weights(const std::string& package) {
    const std::vector<std::string> wanted = loader_->get_constant_fqns();
    std::set<std::string> names(wanted.begin(), wanted.end());
    for (const auto& item : weights_)
      if (names.erase(item.first) == 0) throw Failure(optc::kDamaged, package + " has no weight " + item.first);
    if (!names.empty()) throw Failure(optc::kDamaged, package + " wants a weight that is not there: " + *names.begin());
    loader_->load_constants(weights_, false, true, true);
  }

  void make_caches() {
    blocks_ = optc::kPaged ? (capacity_ + optc::kBlockSize - 1) / optc::kBlockSize : 0;
    for (const optc::Cache& cache : optc::kCaches) {
      const auto options = at::TensorOptions().dtype(scalar_type(cache.type));
      caches_.push_back(optc::kPaged ? at::zeros({blocks_, optc::kBlockSize, cache.heads, cache.width}, options)
                                     : at::zeros({1, cache.heads, capacity_, cache.width}, options));
    }
  }

  // Ids [1, S] and the mask [1, T], of which only the sum counts: T tokens are held after the run.
  std::vector<Tensor> linear_inputs(const optc::Tokens& tokens) const {
    const Tensor ids = numbers(tokens).unsqueeze(0);
    return {ids, at::ones({1, held_ + ids.size(1)}, at::kLong)};
  }

  // Ids, positions, slots [S], block tables [1, blocks], lengths [1] and starts [2] of the only row, whose block i
  // is block i of the pool.
  std::vector<Tensor> paged_inputs(const optc::Tokens& tokens) const {
    const auto count = static_cast<std::int64_t>(tokens.size());
    optc::Tokens places(tokens.size());
    for (std::int64_t i = 0; i < count; ++i) places[static_cast<std::size_t>(i)] = held_ + i;
    optc::Tokens table(static_cast<std::size_t>(blocks_));
    for (std::int64_t i = 0; i < blocks_; ++i) table[static_cast<std::size_t>(i)] = i;
    const Tensor position = numbers(places);
    return {numbers(tokens), position, position.clone(), numbers(table).to(at::kInt).unsqueeze(0),
            numbers({held_ + count}).to(at::kInt), numbers({0, count}).to(at::kInt)};
  }

  static Tensor numbers(const optc::Tokens& values) {
    Tensor tensor = at::empty({static_cast<std::int64_t>(values.size())}, at::kLong);
    std::copy(values.begin(), values.end(), tensor.data_ptr<std::int64_t>());
    return tensor;
  }

  std::int64_t capacity_, held_ = 0, blocks_ = 0;
  Weights weights_;  // the package points into them
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
  std::vector<Tensor> caches_;
};

}  // namespace

extern "C" optc::Decoder* optc_open_decoder(const optc::Setup* setup);

extern "C" optc::Decoder* optc_open_decoder(const optc::Setup* setup) { return new PackageDecoder(*setup); }

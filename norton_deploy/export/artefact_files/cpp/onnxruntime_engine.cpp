#include "engine.h"

#include <filesystem>

#include <onnxruntime_cxx_api.h>

#include "contract.h"

namespace {

class OnnxRuntimeEngine : public Engine {
public:
    explicit OnnxRuntimeEngine(const std::string& path)
        : session_(environment_, std::filesystem::path(path).c_str(), Ort::SessionOptions{}) {}

    Outputs run(const void* input) override {
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        const auto type =
            contract::UINT8_INPUT ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        Ort::Value tensor = Ort::Value::CreateTensor(
            memory, const_cast<void*>(input), contract::INPUT_BYTES, contract::INPUT_SHAPE.data(),
            contract::INPUT_SHAPE.size(), type);
        std::vector<const char*> names;
        for (const auto& output : contract::OUTPUTS) names.push_back(output.name);
        const char* input_name = contract::INPUT_NAME;
        auto values =
            session_.Run(Ort::RunOptions{nullptr}, &input_name, &tensor, 1, names.data(), names.size());
        Outputs found;
        for (std::size_t index = 0; index < names.size(); ++index) {
            const char* data = static_cast<const char*>(values[index].GetTensorRawData());
            found[names[index]].assign(data, data + contract::OUTPUTS[index].bytes);
        }
        return found;
    }

private:
    Ort::Env environment_{ORT_LOGGING_LEVEL_ERROR, "detect"};
    Ort::Session session_;
};

}  // namespace

std::unique_ptr<Engine> open_engine(const std::string& path) { return std::make_unique<OnnxRuntimeEngine>(path); }
